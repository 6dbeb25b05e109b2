"""Balance, position weight, decision head and margin, alone and together, against the formulas label by label."""

import itertools
from dataclasses import replace

import pytest
import torch
from dense_objective import dense_objective
from objective_batches import ANCHOR, SILENCE, batch_of, random_batch, random_decisions, random_logits, rows_of

from moss_train.data.batch import Batch
from moss_train.model.predictions import Predictions
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.labels import Total
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.streams.compiled import IGNORED_LABEL, Kind

WEIGHTS = {
    "text": 1.0, "onset": 2.0, "idle_silence": 0.1, "stop_silence": 0.7, "revision": 1.5, "stale": 0.25, "think": 0.6,
}  # fmt: skip
#: every combination of every option
CONFIGS = [
    ObjectiveConfig(
        weights=WEIGHTS, focal_gamma=gamma, normaliser=normaliser, balance=balance, frame_position_weight=position,
        decision_head_weight=head, margin=margin, margin_weight=0.4,
    )
    for gamma, normaliser, balance, position, head, margin in itertools.product(
        (0.0, 2.0), ("valid", "weights"), ("none", "state"), (None, 0.3), (None, 0.7), (None, 1.5)
    )
]  # fmt: skip


def trained(config: ObjectiveConfig, parts: list[tuple[Batch, Predictions]]):
    """The outputs of the product's loss on microbatches of one global batch."""
    objective = StreamingLoss(config, SILENCE, anchor_id=ANCHOR)
    totals = sum(objective.totals(batch) for batch, _ in parts)
    return [objective(predictions, batch, totals) for batch, predictions in parts]


def check(config: ObjectiveConfig, batch: Batch, seed: int = 0, head: bool = True):
    """Loss and gradients of `batch` as one microbatch equal the dense formula's."""
    logits, wanted_logits = random_logits(seed, batch), random_logits(seed, batch)
    decisions, wanted_decisions = (random_decisions(seed, batch) if head else None for _ in range(2))
    (output,) = trained(config, [(batch, Predictions(logits, decisions))])
    wanted = dense_objective(wanted_logits, wanted_decisions, batch, config)
    output.loss.backward()
    wanted.backward()
    assert output.loss.item() == pytest.approx(wanted.item(), rel=2e-6, abs=1e-7)
    torch.testing.assert_close(logits.grad, wanted_logits.grad, rtol=1e-5, atol=1e-8)
    if head:
        if wanted_decisions.grad is None:  # nothing was to be decided
            wanted_decisions.grad = torch.zeros_like(wanted_decisions)
        torch.testing.assert_close(decisions.grad, wanted_decisions.grad, rtol=1e-5, atol=1e-8)
    return output


def test_every_combination_of_options_equals_the_dense_formula():
    batch = random_batch(0)
    for config in CONFIGS:
        check(config, batch, head=config.decision_head_weight is not None)


def unpacked(batch: Batch, logits: torch.Tensor, decisions: torch.Tensor):
    """Every stream of every row as a row of its own."""
    for row in range(batch.rows):
        for segment in batch.segments_RT[row].unique().tolist():
            here = batch.segments_RT[row] == segment
            names = [name for name in vars(batch) if name.endswith("_RT")]
            alone = {name: getattr(batch, name)[row : row + 1, here] for name in names}
            yield (
                replace(rows_of(batch, slice(row, row + 1)), **alone),
                Predictions(logits[here, row : row + 1], decisions[here, row : row + 1]),
            )


def split(batch: Batch, logits: torch.Tensor, decisions: torch.Tensor):
    """Microbatches of unequal size."""
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        yield rows_of(batch, part), Predictions(logits[:, part], decisions[:, part])


@pytest.mark.parametrize("cut", [unpacked, split])
def test_packing_and_accumulation_change_nothing(cut):
    batch = random_batch(1, rows=6)
    batch.weights_RT[4] = 0.0  # a sample that the loader has masked
    for config in CONFIGS[-1], CONFIGS[-17], CONFIGS[len(CONFIGS) // 2 - 1]:
        whole, apart = ((random_logits(1, batch), random_decisions(1, batch)) for _ in range(2))
        (one,) = trained(config, [(batch, Predictions(*whole))])
        several = trained(config, list(cut(batch, *apart)))
        one.loss.backward()
        sum(output.loss for output in several).backward()
        wanted = dense_objective(*(tensor.detach() for tensor in whole), batch, config)
        assert sum(output.loss.item() for output in several) == pytest.approx(wanted.item(), rel=2e-6)
        for alone, together in zip(apart, whole, strict=True):
            torch.testing.assert_close(alone.grad, together.grad, rtol=1e-5, atol=1e-8)
        expected, found = (LossFigures.from_statistics(statistics(outputs)) for outputs in ([one], several))
        for name, value in vars(expected).items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(
    "kinds",
    [
        [Kind.IDLE_SILENCE, Kind.TEXT, Kind.IDLE_SILENCE],  # nobody speaks
        [Kind.ONSET, Kind.TEXT, Kind.TEXT],  # no silence
        [Kind.TEXT, Kind.TEXT, Kind.STALE],  # nothing to decide
    ],
)
def test_a_class_that_does_not_occur(kinds):
    batch = batch_of(kinds=[kinds], labels=[[SILENCE if kind == Kind.IDLE_SILENCE else 9 for kind in kinds]])
    batch.ids_RT.fill_(ANCHOR)
    for config in CONFIGS[-1], replace(CONFIGS[-1], normaliser="valid"):
        assert check(config, batch).loss.isfinite()


def test_a_microbatch_without_labels_is_zero_and_reaches_the_decision_head():
    batch = batch_of(kinds=[[0, 0]], labels=[[IGNORED_LABEL] * 2])
    logits, decisions = random_logits(0, batch), random_decisions(0, batch)
    (output,) = trained(CONFIGS[-1], [(batch, Predictions(logits, decisions))])
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert torch.equal(decisions.grad, torch.zeros_like(decisions))


def test_what_the_head_says_elsewhere_than_at_decisions_does_not_matter():
    batch = random_batch(2)
    decided_RT = (batch.ids_RT == ANCHOR) & ((batch.kinds_RT == Kind.ONSET) | (batch.kinds_RT == Kind.IDLE_SILENCE))
    opens_RT = (batch.ids_RT == ANCHOR) & (batch.kinds_RT == Kind.REVISION)
    logits, decisions = random_logits(2, batch), random_decisions(2, batch).detach()
    decisions[~(decided_RT | opens_RT).T] = float("nan")
    decisions.requires_grad_()
    (output,) = trained(ObjectiveConfig(), [(batch, Predictions(logits, decisions))])
    output.loss.backward()
    assert output.loss.isfinite() and decisions.grad.isfinite().all()
    assert (decisions.grad.T[decided_RT] != 0).all()


def test_balance_makes_both_classes_of_state_labels_weigh_the_same():
    """Three silences and one onset: α = 4/6 and 4/2, so that each class has mass 2 before cross-entropies."""
    batch = batch_of(
        kinds=[[Kind.IDLE_SILENCE, Kind.IDLE_SILENCE, Kind.ONSET, Kind.TEXT, Kind.STOP_SILENCE]],
        labels=[[SILENCE, SILENCE, 9, 8, SILENCE]],
    )
    objective = StreamingLoss(ObjectiveConfig(balance="state", normaliser="weights"), SILENCE)
    totals = objective.totals(batch)
    assert totals[Total.SILENCES] == 3 and totals[Total.STARTS] == 1
    output = objective(torch.zeros(5, 1, 24), batch, totals)
    masses = output.per_kind_mass / torch.tensor(24.0).log()
    assert (masses[Kind.IDLE_SILENCE] + masses[Kind.STOP_SILENCE]).item() == pytest.approx(2.0, rel=1e-6)
    assert masses[Kind.ONSET].item() == pytest.approx(2.0, rel=1e-6)
    assert output.loss.item() == pytest.approx(torch.tensor(24.0).log().item(), rel=1e-6)  # Z = 2 + 2 + 1


def test_the_position_weight_is_of_frames_whatever_the_label():
    batch = batch_of(kinds=[[Kind.IDLE_SILENCE, Kind.ONSET, Kind.TEXT, Kind.TEXT]], labels=[[SILENCE, 9, 8, 7]])
    batch.ids_RT[0, :3] = ANCHOR
    objective = StreamingLoss(ObjectiveConfig(frame_position_weight=0.25), SILENCE, anchor_id=ANCHOR)
    output = objective(torch.zeros(4, 1, 24), batch, objective.totals(batch))
    assert output.loss.item() == pytest.approx((3 * 0.25 + 1) / 4 * torch.tensor(24.0).log().item(), rel=1e-6)


def test_an_objective_that_needs_the_anchor_says_so():
    with pytest.raises(ValueError, match="anchor_id"):
        StreamingLoss(ObjectiveConfig(frame_position_weight=0.5))
    batch, objective = random_batch(0), StreamingLoss(ObjectiveConfig())
    with pytest.raises(ValueError, match="anchor_id"):
        predictions = Predictions(random_logits(0, batch), random_decisions(0, batch))
        objective(predictions, batch, objective.totals(batch))
