"""Jobs of forked ranks: train a step and save in one layout; load and train on in another."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moss_train.bench.equivalence.batches import microbatches
from moss_train.bench.equivalence.cases import STEPS, Case
from moss_train.bench.equivalence.compare import tolerance, weight_deviations
from moss_train.bench.equivalence.outcome import starting_weights
from moss_train.bench.equivalence.streams import tokenizer
from moss_train.checkpoint.saver import Saver
from moss_train.checkpoint.store import open_together
from moss_train.engines import build_engine
from moss_train.engines.pieces import MemorySource
from moss_train.model.build import build_model, whole_model
from moss_train.model.groups import trainable_names
from moss_train.model.precision import Precision
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups


def engine_of(case: Case, seed: int):
    """The engine of this rank, its weights fresh from `seed`."""
    state = groups.initialize(case.layout, seed=seed)
    problem = case.problem
    engine = build_engine(case.engine())
    dtype = Precision.named(case.precision).dtype
    model = build_model(problem.model(), state, dtype, case.recompute, seed=seed, store=engine.parameter_store())
    with torch.device("meta"):
        trained = trainable_names(whole_model(problem.model(), state), problem.trainable)
    engine.setup(
        model,
        trained,
        problem.optim(),
        StreamingLoss(problem.objective(), tokenizer().special.silence, anchor_id=tokenizer().special.anchor),
        STEPS,
    )
    return engine, state


def save_after_a_step(rank: int, ranks: int, case: Case, folder: str) -> dict:
    """Train one step and save. Beside the checkpoint, on the main rank: the whole state as the engine gathers it, by
    another way than `pieces`."""
    engine, state = engine_of(case, seed=1)
    shapes = {name.removeprefix("model/"): shape for name, shape in engine.expected_shapes(optimizer=False).items()}
    started = starting_weights(case.problem, shapes)
    engine.load_weights(MemorySource({f"model/{name}": weight for name, weight in started.items()}))
    engine.train_step(microbatches(case, 0, state))
    saver = Saver(Path(folder), file_bytes=20_000)
    saver.begin(1, engine.pieces(), {"engine": engine.metadata()}, {})
    whole = {name: tensor.clone().contiguous() for name, tensor in engine.state_dict().tensors.items()}
    # The copy is the saver's own: what is trained while it writes does not reach the checkpoint.
    engine.train_step(microbatches(case, 1, state))
    saver.finish()
    if state.is_main:
        save_file(whole, Path(folder) / "whole.safetensors")
    return {"rank_bytes": sum(piece.tensor.nbytes for piece in engine.pieces())}


def load_and_train_on(rank: int, ranks: int, case: Case, folders: list[str]) -> dict[str, list[str]]:
    """Of each folder: what is not as it should be after loading its checkpoint in this layout and taking one more step,
    which the first loader of a folder writes for those that come later."""
    engine, state = engine_of(case, seed=2)
    problems: dict[str, list[str]] = {}
    for folder in map(Path, folders):
        found = problems.setdefault(str(folder), [])
        checkpoint = open_together(folder / "step_00000001")
        engine.load(checkpoint, checkpoint.state["engine"])
        loaded = {name: tensor.clone().contiguous() for name, tensor in engine.state_dict().tensors.items()}
        loss = engine.train_step(microbatches(case, 1, state)).loss
        after = {name: tensor.clone().contiguous() for name, tensor in engine.whole_weights().items()}
        if not state.is_main:
            continue
        whole = load_file(folder / "whole.safetensors")
        stored = checkpoint.tensors()
        for what, tensors in (("stored", stored), ("loaded", loaded)):
            found += [f"{what}: names differ"] if tensors.keys() != whole.keys() else []
            found += [f"{what}: {n} differs" for n in whole if n in tensors and not torch.equal(tensors[n], whole[n])]
        reference = folder / "after.safetensors"
        if not reference.exists():
            save_file(after | {"loss": torch.tensor(loss, dtype=torch.float64)}, reference)
        expected = load_file(reference)
        allowed = tolerance(case)
        if abs(loss - float(expected["loss"])) > allowed.loss * float(expected["loss"]):
            found.append(f"loss {loss}, not {float(expected['loss'])}")
        start = {name: whole[name] for name in after}
        deviations = weight_deviations(start, after, {name: expected[name] for name in after}, allowed)
        found += [f"{n} after one more step deviates by {d}" for n, d in deviations.items() if not d <= allowed.weight]
    return problems
