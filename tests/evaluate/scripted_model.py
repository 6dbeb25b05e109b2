"""A model that says what a compiled stream says, and insists on being fed exactly that stream."""

import numpy as np
import torch

from moss_train.data.synthetic.world import sample_stream
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import StreamSample, parse_sample
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer


def shipped_tokenizer() -> StreamTokenizer:
    return load_tokenizer(TokenizerConfig())


def world_stream(
    tokenizer: StreamTokenizer, config: CompilerConfig, seed: int, scenario: str | None = None
) -> tuple[StreamSample, CompiledStream]:
    """A stream of the pace of held-out clips: those of training are too dense for slow speakers."""
    clip = sample_stream(np.random.default_rng(seed), "heldout", f"clip{seed}", scenario)
    return compiled_stream(clip.sample, tokenizer, config)


def compiled_stream(
    sample: dict, tokenizer: StreamTokenizer, config: CompilerConfig
) -> tuple[StreamSample, CompiledStream]:
    parsed = parse_sample(sample, sample["id"])
    media = {medium["id"]: MediaInfo(medium["duration_s"], 4.0, None) for medium in sample["media"]}
    return parsed, compile_sample(parsed, media, tokenizer, config, np.random.default_rng(0))


class ScriptedModel(torch.nn.Module):
    """Row r follows `scripts[r]`: it predicts the labels, and where none is set goes on as if to talk for ever.

    Everything that is fed is compared with the stream: ids, positions, visibility, the frames and their positions.
    `off_script` rows are not compared.
    """

    def __init__(self, scripts: list[CompiledStream], tokenizer: StreamTokenizer, off_script: bool = False):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.scripts, self.tokenizer, self.off_script = scripts, tokenizer, off_script
        self.fed = [0] * len(scripts)
        self.frames = [0] * len(scripts)
        self.heard: list[list[int]] = [[] for _ in scripts]
        self.babble = tokenizer.encode("x")[0]
        self.extend_calls = 0

    def start_streams(self, rows: int, max_tokens: int | None, max_frames: int | None, sight=None, keep=None) -> None:
        assert rows == len(self.scripts)
        self.max_tokens, self.max_frames = max_tokens, max_frames

    def add_frames(self, state, frames_NCHW, rows_N, positions_N) -> None:
        for picture, row, position in zip(frames_NCHW, rows_N.tolist(), positions_N.tolist(), strict=True):
            if not self.off_script:
                assert position == self.scripts[row].frame_positions[self.frames[row]]
                assert picture.flatten()[0] == self.frames[row], "the wrong picture"
            self.frames[row] += 1
            assert self.max_frames is None or self.frames[row] <= self.max_frames

    def encode_new_frames(self, state, frames_NCHW):
        return frames_NCHW

    def add_features(self, state, features, rows_N, positions_N) -> None:
        self.add_frames(state, features, rows_N, positions_N)

    def extend(self, state, ids_RL, positions_RL, lengths_R, visible_lo_RL=None, visible_hi_RL=None, sinks=0, **more):
        assert more.pop("only_last")
        self.extend_calls += 1
        ids, positions = ids_RL.tolist(), positions_RL.tolist()
        lo, hi = visible_lo_RL.tolist(), visible_hi_RL.tolist()
        logits_RLV = torch.zeros(*ids_RL.shape, self.tokenizer.vocabulary_size)
        logits_RLV[..., self.tokenizer.special.end_of_turn] = 9.0  # the most probable, and never to be said
        for row, script in enumerate(self.scripts):
            for step in range(int(lengths_R[row])):
                at = self.fed[row]
                label = self.babble
                if not self.off_script:
                    assert ids[row][step] == script.ids[at], f"row {row} token {at}"
                    assert positions[row][step] == script.positions[at]
                    assert lo[row][step] == script.visible_lo[at]
                    assert hi[row][step] == script.visible_hi[at] <= self.frames[row]
                    assert sinks == script.sinks
                    label = self.babble if script.labels[at] == IGNORED_LABEL else int(script.labels[at])
                logits_RLV[row, step, label] = 5.0
                self.fed[row] += 1
                self.heard[row].append(ids[row][step])
                assert self.max_tokens is None or self.fed[row] <= self.max_tokens
        last_R = (lengths_R - 1).clamp(min=0)
        return logits_RLV[torch.arange(len(last_R)), last_R]
