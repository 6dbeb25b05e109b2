"""The loss on logits split over two tensor-parallel ranks equals the loss on whole logits."""

import moss_train.parallel  # noqa: F401  the CPU seam goes in before megatron is imported

# isort: split
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core import parallel_state, tensor_parallel
from objective_batches import SILENCE, random_batch

from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss

VOCABULARY = 24
RANKS = 2


def _loss_and_gradient(logits, batch, group):
    objective = StreamingLoss(ObjectiveConfig(weights={"idle_silence": 0.1}, focal_gamma=2.0), SILENCE)
    if group is not None:
        objective.split_over(group, tensor_parallel.vocab_parallel_cross_entropy)
    logits = logits.clone().requires_grad_()
    output = objective(logits, batch, objective.normaliser(batch))
    output.loss.backward()
    return output, logits.grad


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{store}")
    parallel_state.initialize_model_parallel(RANKS, 1)
    batch = random_batch(11)
    rows, length = batch.ids_RT.shape
    whole = 2 * torch.randn(length, rows, VOCABULARY, generator=torch.Generator().manual_seed(3))
    reference, reference_gradient = _loss_and_gradient(whole, batch, None)
    part = slice(rank * VOCABULARY // RANKS, (rank + 1) * VOCABULARY // RANKS)
    split = whole[..., part].clone()
    output, gradient = _loss_and_gradient(split, batch, parallel_state.get_tensor_model_parallel_group())
    assert torch.equal(split, whole[..., part]), "the caller's logits were changed in place"
    torch.testing.assert_close(output.loss, reference.loss)
    torch.testing.assert_close(gradient, reference_gradient[..., part])
    torch.testing.assert_close(output.per_kind_sum, reference.per_kind_sum)
    assert torch.equal(output.decisions, reference.decisions)
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path / "store"),), nprocs=RANKS, start_method="spawn")
