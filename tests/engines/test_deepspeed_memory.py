"""With ZeRO 3 no process ever holds more than its runs of the parameters and one part of the model."""

import gc

from engine_parts import TINY_VISION

# isort: split
import pytest
import torch

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.engines import EngineConfig, build_engine
from moss_train.engines.config import OptimConfig
from moss_train.engines.memory import LiveTensors
from moss_train.model.build import build_model, whole_model
from moss_train.model.config import ModelConfig, TextConfig
from moss_train.model.groups import trainable_names
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

RANKS = 4
#: DeepSpeed's own is of 2 GB.
BUCKET = {"zero_optimization": {"reduce_bucket_size": 1000}}


def sizes() -> ModelConfig:
    """Twenty layers beside which everything else is small."""
    return ModelConfig(
        name="memory_test",
        vision=TINY_VISION,
        text=TextConfig(
            vocabulary_size=32,
            hidden_size=64,
            layers=20,
            cross_layers=[3, 8, 13],
            attention_heads=4,
            key_value_heads=4,
            mlp_size=256,
            rope_scaling=None,
        ),
    )


def build_and_set_up(rank: int, ranks: int, seed: int | None, shared: bool) -> dict[str, int]:
    """A job: bytes of parts and of all parameters, and the most that was live beyond what was there before."""
    state = groups.initialize(LayoutConfig(dp=ranks, zero=3))
    engine = build_engine(EngineConfig(name="deepspeed", deepspeed=BUCKET))
    with torch.device("meta"):
        whole = whole_model(sizes(), state)
    told = {
        "all": sum(parameter.nbytes for parameter in whole.parameters()),
        "part": max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in whole.decoder_layers),
    }
    gc.collect()
    with LiveTensors() as live:
        before = live.current
        model = build_model(sizes(), state, seed=seed, store=engine.parameter_store() if shared else None)
        told["building"] = live.peak - before
    gc.collect()
    with LiveTensors() as live:
        engine.setup(
            model,
            trainable_names(whole, "all"),
            OptimConfig(name="sgd", lr=0.1),
            StreamingLoss(ObjectiveConfig(), silence_id=0),
            total_steps=1,
        )
        told["setting_up"] = live.peak - before
    return told


@pytest.fixture(scope="module")
def ranks():
    with Ranks(RANKS) as forked:
        yield forked


@pytest.mark.parametrize("seed", [1, None], ids=["fresh", "to be loaded"])
def test_a_process_never_holds_more_than_its_runs_and_one_part(ranks, seed):
    for told in ranks.run(RANKS, build_and_set_up, seed, True):
        runs = told["all"] / RANKS
        assert told["building"] < 1.05 * runs + 1.4 * told["part"]
        # DeepSpeed lays its runs end to end, through a copy of them, and clears a buffer of their size.
        assert told["setting_up"] < 3.2 * runs


def test_the_measure_sees_a_whole_model(ranks):
    for told in ranks.run(RANKS, build_and_set_up, 1, False):
        assert told["building"] > 0.95 * told["all"]
