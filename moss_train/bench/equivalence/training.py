"""The training whose numbers are in question: the product's model and engine in a layout, on every rank of it."""

from collections.abc import Callable
from pathlib import Path

import torch

from moss_train.bench.equivalence.batches import microbatches
from moss_train.bench.equivalence.cases import STEPS, Case
from moss_train.bench.equivalence.outcome import Figures, Outcome, starting_weights
from moss_train.bench.equivalence.streams import tokenizer
from moss_train.engines import build_engine
from moss_train.engines.pieces import MemorySource
from moss_train.model.build import build_model, whole_model
from moss_train.model.groups import trainable_names
from moss_train.model.precision import Precision
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.slices import own_slice

#: (rank, ranks, case, where the main rank writes the tensors) → figures of every step, names of the trained parameters
Job = Callable[[int, int, Case, str], tuple[list[Figures], list[str]]]


def train_case(rank: int, ranks: int, case: Case, path: str) -> tuple[list[Figures], list[str]]:
    """A job: figures of every step as this rank saw them, and the names it was told to train. The main rank writes the
    tensors to `path`."""
    state = groups.initialize(case.layout, seed=case.problem.seed)
    problem = case.problem
    engine = build_engine(case.engine())
    dtype = Precision.named(case.precision).dtype
    model = build_model(
        problem.model(), state, dtype, case.recompute, seed=problem.seed, store=engine.parameter_store()
    )
    with torch.device("meta"):
        trained = trainable_names(whole_model(problem.model(), state), problem.trainable)
    special = tokenizer().special
    objective = StreamingLoss(problem.objective(), special.silence, anchor_id=special.anchor)
    engine.setup(model, trained, problem.optim(), objective, STEPS)
    tensors = {"fresh": _plain(engine.whole_weights())}
    shapes = _plain(engine.expected_shapes(optimizer=False))
    started = {f"model/{name}": weight for name, weight in starting_weights(problem, shapes).items()}
    engine.load_weights(MemorySource(started))
    tensors["start"] = _plain(engine.whole_weights())

    evaluated = engine.eval_step(microbatches(case, 0, state)).loss
    steps = []
    for step in range(STEPS):
        engine.keep_gradients = step == 0
        output = engine.train_step(microbatches(case, step, state))
        steps.append(Figures(output.loss, output.grad_norm, output.per_kind, output.per_kind_count))
        if step == 0:
            if evaluated != output.loss:
                raise AssertionError(f"eval_step gives a loss of {evaluated}, train_step of {output.loss}")
            tensors["gradient"] = _plain(engine.gradients())
            tensors["first"] = _plain(engine.whole_weights())
    part = engine.evaluated_part()
    # Before whole weights are asked for, which may bring this process's up to date.
    held = {} if part is None else _plain(dict(part.named_parameters()))
    tensors["last"] = _plain(engine.whole_weights())
    if state.is_main:
        for name, weight in held.items():
            expected = own_slice(part.get_parameter(name), tensors["last"][name], state.tensor_group)
            if not torch.equal(weight, expected.to(weight)):
                raise AssertionError(f"evaluated_part gives a {name} that is not the one that was trained")
        Outcome(steps, sorted(trained), tensors).save_tensors(Path(path))
    return steps, sorted(trained)


def _plain(named: dict) -> dict:
    return {
        name.removeprefix("model/"): value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in named.items()
    }


def same_figures(left: list[Figures], right: list[Figures]) -> bool:
    """Whether two ranks reported exactly the same."""
    return str(left) == str(right)  # as text, in which a NaN equals a NaN
