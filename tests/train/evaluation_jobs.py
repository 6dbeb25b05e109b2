"""Evaluation in the loop as a job of forked ranks."""

import os
from collections import Counter
from dataclasses import dataclass, field

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


@dataclass
class Evaluated:
    """What one process found."""

    figures: list[dict[str, float]] = field(default_factory=list)  #: one evaluation each
    beats: int = 0  #: signs of life it gave meanwhile
    assembled: int = 0  #: times that it took part in assembling the model
    reads: list[int] = field(default_factory=list)  #: samples whose frames it had decoded after each evaluation


def evaluate(rank: int, ranks: int, overrides: list[str], evaluations: list[tuple[str, int]]) -> Evaluated:
    """A job: the figures of a model that is being trained in the layout of `overrides`. Each of `evaluations` is a
    value of `decode.decide_by` and how many streams (and conversations) there are."""
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
    found, calls, beats = Evaluated(), Counter(), phases.activity().beats
    for whose, method in (
        (engine, "each_weight"),
        (evaluator._stream_frames.corpus, "frames"),
        (evaluator._conversation_frames.corpus, "frames"),
    ):
        _count(whose, method, calls)
    for run.evaluate.decode.decide_by, run.evaluate.during_training in evaluations:
        found.figures.append(evaluator.figures(engine, stage.compiler))
        found.reads.append(calls["frames"])
    found.beats, found.assembled = phases.activity().beats - beats, calls["each_weight"]
    return found


def _count(whose, method: str, calls: Counter) -> None:
    original = getattr(whose, method)

    def counted(*arguments):
        calls[method] += 1
        return original(*arguments)

    setattr(whose, method, counted)


def _weights(run, state, silence: int):
    """Larger than fresh ones, so that the model does everything."""
    for name, weight in fresh_weights(run.model, state.own_group, torch.float32, run.seed):
        weight = 3.0 * weight
        if name == "head.weight":
            weight[silence] *= 4.0
        if name == "decision_head.weight":
            weight = torch.linspace(-1.0, 1.0, weight.numel())[None]
        yield f"{NAMESPACE}/{name}", weight
