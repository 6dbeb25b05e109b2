"""The reference: one process, plain PyTorch. No engine, no schedule, no packing, no recompute, dense masks.

One forward pass for each stream of the global batch, the sum of their losses, a plain backward pass, torch's own
clipping and torch's own optimizer.
"""

import dataclasses
from pathlib import Path

import torch

from moss_train.bench.equivalence.batches import single_rows
from moss_train.bench.equivalence.cases import STEPS, Problem
from moss_train.bench.equivalence.outcome import Figures, Outcome, starting_weights
from moss_train.bench.equivalence.streams import tokenizer
from moss_train.engines.config import OptimConfig
from moss_train.model.build import build_model
from moss_train.model.groups import trainable_names
from moss_train.model.video_model import VideoModel
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig


def train_reference(rank: int, ranks: int, problem: Problem, path: str) -> tuple[list[Figures], list[str]]:
    """A job of one rank: figures of every step and the names of the trained parameters; tensors go to `path`."""
    outcome = train(problem)
    outcome.save_tensors(Path(path))
    return outcome.steps, outcome.trained


def train(problem: Problem) -> Outcome:
    """Train `problem` in this process, which must be alone in its torch.distributed."""
    state = groups.initialize(LayoutConfig(), seed=problem.seed)
    config = dataclasses.replace(problem.model(), attention="dense")
    model = build_model(config, state, seed=problem.seed)
    tensors = {"fresh": _weights(model)}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, weight in starting_weights(problem, shapes).items():
            model.get_parameter(name).copy_(weight)
    tensors["start"] = _weights(model)

    trained = trainable_names(model, problem.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = _optimizer(problem.optim(), model)
    objective = StreamingLoss(problem.objective(), tokenizer().special.silence)
    steps = []
    for step in range(STEPS):
        steps.append(_step(problem, step, model, objective, optimizer))
        if step == 0:
            tensors["gradient"] = {
                name: parameter.grad.clone() for name, parameter in model.named_parameters() if name in trained
            }
            tensors["first"] = _weights(model)
    tensors["last"] = _weights(model)
    return Outcome(steps, sorted(trained), tensors)


def _step(problem: Problem, step: int, model: VideoModel, objective: StreamingLoss, optimizer) -> Figures:
    rows = single_rows(problem, step)
    normaliser = sum(objective.normaliser(row) for row in rows)
    optimizer.zero_grad()
    outputs = [objective(model(row), row, normaliser) for row in rows]
    sum(output.loss for output in outputs).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # its path was not taken: no frames in the batch
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, problem.clip or float("inf"))
    optimizer.step()
    figures = LossFigures.from_statistics(statistics(outputs))
    return Figures(figures.loss, float(norm), figures.per_kind, figures.per_kind_count)


def _optimizer(optim: OptimConfig, model: VideoModel) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optim.name == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr)
    decayed, steady = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, optim.weight_decay), (steady, 0.0))
        if members
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)


def _weights(model: VideoModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
