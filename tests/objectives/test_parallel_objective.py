"""The objective over two data-parallel × two tensor-parallel ranks, two microbatches each, equals the dense formula."""

import moss_train.parallel  # noqa: F401  the CPU seam goes in before megatron is imported

# isort: split
import pytest
import torch
import torch.distributed as dist
from dense_objective import dense_objective
from megatron.core import tensor_parallel
from objective_batches import ANCHOR, SILENCE, VOCABULARY, random_batch, random_decisions, random_logits, rows_of
from test_objective_options import CONFIGS

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.model.predictions import Predictions
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

SEED, ROWS = 11, 8
USED = [CONFIGS[0], *CONFIGS[1::6], CONFIGS[-1]]


def _train(rank: int, ranks: int) -> list[tuple]:
    """A job: of every objective the loss, the figures and the gradients of what this rank holds."""
    state = groups.initialize(LayoutConfig(tp=2, dp=2))
    batch, results = random_batch(SEED, ROWS), []
    first_row, own = state.data_rank * ROWS // 2, VOCABULARY // 2
    parts = [slice(first_row, first_row + 1), slice(first_row + 1, first_row + ROWS // 2)]
    columns = slice(state.tensor_rank * own, (state.tensor_rank + 1) * own)
    for config in USED:
        objective = StreamingLoss(config, SILENCE, anchor_id=ANCHOR)
        objective.split_over(state.tensor_group, tensor_parallel.vocab_parallel_cross_entropy)
        logits, decisions = random_logits(SEED, batch).detach(), random_decisions(SEED, batch)
        before = logits.clone()
        held = logits[..., columns].requires_grad_()
        totals = sum(objective.totals(rows_of(batch, part)) for part in parts)
        dist.all_reduce(totals, group=state.data_group)
        outputs = [
            objective(Predictions(held[:, part], decisions[:, part]), rows_of(batch, part), totals) for part in parts
        ]
        sum(output.loss for output in outputs).backward()
        assert torch.equal(logits, before), "the caller's logits were changed in place"
        summed = statistics(outputs)
        dist.all_reduce(summed, group=state.data_group)
        results.append((vars(LossFigures.from_statistics(summed)), columns, held.grad, decisions.grad))
    return results


def test_four_ranks_equal_the_dense_formula():
    with Ranks(4) as ranks:
        found = ranks.run(4, _train, deadline_s=120.0)
    batch = random_batch(SEED, ROWS)
    for number, config in enumerate(USED):
        logits, decisions = random_logits(SEED, batch), random_decisions(SEED, batch)
        wanted = dense_objective(logits, decisions, batch, config)
        wanted.backward()
        alone = StreamingLoss(config, SILENCE, anchor_id=ANCHOR)
        whole = alone(Predictions(logits, decisions), batch, alone.totals(batch))
        expected = vars(LossFigures.from_statistics(statistics([whole])))
        gradient, head_gradient = torch.zeros_like(logits), torch.zeros_like(decisions)
        for rank, results in enumerate(found):
            figures, columns, own_gradient, own_head_gradient = results[number]
            assert figures["loss"] == pytest.approx(wanted.item(), rel=2e-6)
            for name, value in expected.items():
                assert figures[name] == pytest.approx(value, rel=1e-5), name
            gradient[..., columns] += own_gradient
            head_gradient += own_head_gradient if rank % 2 == 0 else 0.0  # tensor ranks compute the same
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(head_gradient, decisions.grad, rtol=1e-5, atol=1e-8)
