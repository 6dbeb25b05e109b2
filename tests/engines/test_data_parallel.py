"""Two data-parallel ranks train exactly as one process on the same global batches."""

import json

from engine_parts import PlainTraining, global_batches, setup_engine, tiny_model

# isort: split
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from moss_train.engines import EngineConfig, build_engine
from moss_train.engines.config import OptimConfig
from moss_train.engines.weights import named_weights
from moss_train.parallel import groups

RANKS, STEPS, POISONED = 2, 5, 3
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip=1.0, warmup_fraction=0.4)


def _shares(microbatches):
    """Rank 0 has three microbatches; rank 1 has one, without a single frame."""
    return [microbatches[0], microbatches[2], microbatches[3]], [microbatches[1]]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/store")
    state = groups.initialize()
    assert (state.data_rank, state.data_ranks) == (rank, RANKS)
    # Rank 1 starts from other weights: those of rank 0 must reach it.
    model = tiny_model(seed=rank)
    engine = setup_engine(build_engine(EngineConfig()), model, OPTIM, total_steps=STEPS)
    outputs = []
    for step, microbatches in enumerate(global_batches(STEPS)):
        mine = _shares(microbatches)[rank]
        if step == POISONED and rank == 1:
            mine[0].weights_RT[:] = float("inf")
        output = engine.train_step(mine)
        outputs.append([output.loss, output.grad_norm, output.labels, output.skipped])
    evaluated = engine.eval_step(_shares(global_batches(1)[0])[rank]).loss
    weights = {name: tensor.tolist() for name, tensor in named_weights(model).items()}
    collected = engine.whole_weights()
    assert set(collected) == (set(weights) if rank == 0 else set())
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump({"outputs": outputs, "evaluated": evaluated, "weights": weights}, file)
    groups.shutdown()


def test_two_ranks_train_as_one_process(tmp_path):
    groups.shutdown()
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(RANKS))
    assert first["weights"] == second["weights"]
    # json writes the skipped step's loss as NaN, which equals nothing; compare its text.
    assert str(first["outputs"]) == str(second["outputs"])
    assert first["evaluated"] == second["evaluated"]

    plain = PlainTraining(OPTIM)
    factors = [0.5, 1.0, 1.0, 2 / 3, 1 / 3]
    for step, (microbatches, factor) in enumerate(zip(global_batches(STEPS), factors, strict=True)):
        loss, grad_norm, labels, skipped = first["outputs"][step]
        assert skipped == (step == POISONED)
        if skipped:
            continue
        expected_loss, expected_norm = plain.step(microbatches, factor)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert grad_norm == pytest.approx(expected_norm, rel=1e-5)
        assert labels == sum(int((one.labels_RT != -100).sum()) for one in microbatches)
    for name, parameter in plain.model.named_parameters():
        trained = torch.tensor(first["weights"][f"model/{name}"])
        torch.testing.assert_close(trained, parameter.detach(), rtol=0, atol=2e-6, msg=name)
    groups.shutdown()
