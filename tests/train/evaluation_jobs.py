"""Evaluation in the loop as a job of forked ranks."""

import os

import torch

from moss_train.engines import build_engine
from moss_train.engines.pieces import MemorySource
from moss_train.engines.weights import NAMESPACE
from moss_train.model.build import build_model, fresh_weights, whole_model
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups, phases
from moss_train.streams.tokenizer import load_tokenizer
from moss_train.train.compose import compose_run
from moss_train.train.evaluation import Evaluator


def evaluate(rank: int, ranks: int, overrides: list[str], times: int = 1) -> tuple[list[dict[str, float]], int]:
    """A job: the figures of a model that is being trained in the layout of `overrides`, so many times, and how many
    signs of life this process gave."""
    os.environ |= {"WORLD_SIZE": str(ranks)}
    run = compose_run(overrides)
    tokenizer = load_tokenizer(run.tokenizer)
    run.model.text.vocabulary_size = tokenizer.vocabulary_size
    state = groups.initialize(run.layout, run.seed)
    engine = build_engine(run.engine)
    model = build_model(run.model, state, seed=None, store=engine.parameter_store())
    with torch.device("meta"):
        names = {name for name, _ in whole_model(run.model, state).named_parameters()}
    stage = run.stages["realtime"]
    engine.setup(model, names, stage.optim, StreamingLoss(stage.objective, tokenizer.special.silence), 1)
    engine.load_weights(MemorySource(dict(_weights(run, state, tokenizer.special.silence))))
    evaluator = Evaluator(run, tokenizer)
    beats = phases.activity().beats
    figures = [evaluator.figures(engine, model, stage.compiler) for _ in range(times)]
    return figures, phases.activity().beats - beats


def _weights(run, state, silence: int):
    """Larger than fresh ones, so that the model does everything."""
    for name, weight in fresh_weights(run.model, state.own_group, torch.float32, run.seed):
        weight = 3.0 * weight
        if name == "head.weight":
            weight[silence] *= 4.0
        yield f"{NAMESPACE}/{name}", weight
