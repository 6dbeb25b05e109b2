"""Streams that grow live in a parallel layout say what they say on one process."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from moss_train.bench.equivalence.cases import Problem
from moss_train.bench.equivalence.streams import IMAGE_SIZE, tokenizer
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.decoder import StreamingDecoder
from moss_train.evaluate.schedule import Step
from moss_train.model.build import build_model
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.config import CompilerConfig

LAYOUTS = {
    "tp2+pp2": LayoutConfig(tp=2, pp=2),
    "tp2+sp+pp2+vpp2": LayoutConfig(tp=2, pp=2, vpp=2, sp=True, frame_shard="tp"),
    "pp2, out and back": LayoutConfig(pp=2, pipeline_schedule="dualpipev"),
    "cp2+pp3 uneven": LayoutConfig(cp=2, pp=3, pipeline_split=[0, 5, 3]),
}
COMPILERS = (
    CompilerConfig(tokens_per_second=3.0),
    CompilerConfig(tokens_per_second=3.0, window=2, sinks=1, text_window=12, text_sinks=5),
)
EXPECTED: list[list["Said"]] = []  #: of one process


@dataclass
class Said:
    """What each row said in each slot, and the logits of every step, the decision head's last."""

    outputs: list
    logits: list


class Listening:
    """Hands calls on to a model and keeps the logits."""

    def __init__(self, model):
        self._model, self.heard = model, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def extend(self, state, ids_RL, positions_RL, lengths_R, **options):
        logits_RV = self._model.extend(state, ids_RL, positions_RL, lengths_R, **options)
        self.heard.append(torch.cat([logits_RV, state.decisions_RL], 1)[lengths_R > 0].tolist())
        return logits_RV


def grow(rank, ranks, layout):
    """A job: three rows of different lengths on the model's part of this process."""
    state = groups.initialize(layout)
    sizes = replace(Problem().model(), init_std=0.3, decision_head=True)
    said = []
    for compiler in COMPILERS:
        model = Listening(build_model(sizes, state, seed=5).eval())
        with torch.no_grad():  # so that it talks now and then, but not always
            if model.part.head:
                every = model.head.weight
                silence = tokenizer().special.silence - state.tensor_rank * len(every)
                if 0 <= silence < len(every):
                    every[silence] *= 2.5
                model.decision_head.weight.copy_(torch.linspace(-1, 1, sizes.text.hidden_size)[None])
        decoder = StreamingDecoder(
            model, tokenizer(), compiler, [None, "Watch.", "Speak."], 400, 8, DecodeConfig(last_slot_tokens=4)
        )
        rng = np.random.default_rng(3)
        outputs = [[], [], []]
        for second in range(6):
            steps, frames = {}, {}
            for row, shown in enumerate((6, 4, 5)):
                if second >= shown:
                    continue
                end_s = second + 1.0 if second + 1 < shown else math.inf
                asks = second == 0 or (row == 1 and second == 2)
                steps[row] = Step(second, end_s, "What is it?" if asks else None)
                if not asks:
                    frames[row] = torch.from_numpy(rng.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))
            for row, output in decoder.step(steps, frames).items():
                outputs[row].append((output.state, output.ids, output.ends))
        said.append(Said(outputs, model.heard))
    return said


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_say_the_same(ranks, layout):
    """fp32: the same tokens, logits within 2e-4 of logits that spread over tens, on every process."""
    if not EXPECTED:
        EXPECTED.extend(ranks.run(1, grow, LayoutConfig()))
    (expected,) = EXPECTED
    world = layout.tp * layout.pp * layout.cp
    for mine in ranks.run(world, grow, layout):
        for one, other in zip(mine, expected, strict=True):
            assert one.outputs == other.outputs
            for left, right in zip(one.logits, other.logits, strict=True):
                torch.testing.assert_close(torch.tensor(left), torch.tensor(right), atol=2e-4, rtol=0)
    states = {state for run in expected for row in run.outputs for state, _, _ in row}
    assert states == {"silence", "speak", "continue"}, "the model must do everything for this test to mean something"
    assert torch.tensor(expected[0].logits[-1]).std() > 1
