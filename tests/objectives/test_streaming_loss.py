"""The streaming loss against a dense float64 formula written out label by label."""

import math

import pytest
import torch
from objective_batches import SILENCE, VOCABULARY, batch_of, random_batch, random_logits, rows_of

from moss_train.errors import ConfigError
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.labels import Total
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.streams.compiled import IGNORED_LABEL, Kind

WEIGHTS = {
    "text": 1.0,
    "onset": 2.0,
    "idle_silence": 0.1,
    "stop_silence": 0.7,
    "revision": 1.5,
    "stale": 0.25,
    "think": 0.6,
}


def dense_loss(logits_TRV, batch, config: ObjectiveConfig) -> torch.Tensor:
    """Σ w (1−p)^γ CE / Z in float64, one label at a time."""
    total, labels, weight_sum = torch.zeros((), dtype=torch.float64), 0, 0.0
    rows, length = batch.ids_RT.shape
    for row in range(rows):
        previous_kind, previous_segment = None, None
        for t in range(length):
            kind, segment = Kind(int(batch.kinds_RT[row, t])), int(batch.segments_RT[row, t])
            if batch.labels_RT[row, t] == IGNORED_LABEL:
                continue
            log_p = logits_TRV[t, row].double().log_softmax(0)[batch.labels_RT[row, t]]
            opens = kind == Kind.ONSET or (
                kind == Kind.REVISION and not (previous_kind == Kind.REVISION and previous_segment == segment)
            )
            gamma = config.focal_gamma if opens or kind in (Kind.IDLE_SILENCE, Kind.STOP_SILENCE) else 0.0
            weight = float(batch.weights_RT[row, t]) * config.weights[kind.name.lower()]
            total = total - weight * (1 - log_p.exp()) ** gamma * log_p
            labels, weight_sum = labels + 1, weight_sum + weight
            previous_kind, previous_segment = kind, segment
    return total / (labels if config.normaliser == "valid" else weight_sum)


@pytest.mark.parametrize("normaliser", ["valid", "weights"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_equal_the_dense_formula(seed, gamma, normaliser):
    config = ObjectiveConfig(weights=WEIGHTS, focal_gamma=gamma, normaliser=normaliser)
    batch, objective = random_batch(seed), StreamingLoss(config)
    logits, reference_logits = random_logits(seed, batch), random_logits(seed, batch)
    output = objective(logits, batch, objective.totals(batch))
    reference = dense_loss(reference_logits, batch, config)
    output.loss.backward()
    reference.backward()
    assert output.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, reference_logits.grad, rtol=1e-5, atol=1e-8)


def test_gradient_agrees_with_finite_differences():
    batch = random_batch(3, rows=1, length=5)
    objective = StreamingLoss(ObjectiveConfig(weights=WEIGHTS, focal_gamma=2.0))
    logits, totals = random_logits(3, batch), objective.totals(batch)
    objective(logits, batch, totals).loss.backward()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    step = 1e-2
    with torch.no_grad():
        ahead = objective(logits + step * direction, batch, totals).loss
        behind = objective(logits - step * direction, batch, totals).loss
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope == pytest.approx((logits.grad * direction).sum().item(), rel=2e-3)


def test_defaults_are_plain_cross_entropy():
    batch = random_batch(4)
    batch.weights_RT.fill_(1.0)
    batch.labels_RT[batch.kinds_RT == Kind.STALE] = IGNORED_LABEL  # plain cross-entropy has no stale labels
    batch.kinds_RT[batch.kinds_RT == Kind.STALE] = Kind.IGNORED
    objective, logits = StreamingLoss(ObjectiveConfig()), random_logits(4, batch)
    plain = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), batch.labels_RT.T.reshape(-1), ignore_index=IGNORED_LABEL
    )
    torch.testing.assert_close(objective(logits, batch, objective.totals(batch)).loss, plain)


def test_silence_weight_is_divided_by_the_count_of_labels():
    """The reference's silence weight 0.1: Σ w·CE / N_valid (N counts tokens, not weights)."""
    batch = batch_of(
        kinds=[[Kind.IGNORED, Kind.IDLE_SILENCE, Kind.ONSET, Kind.STOP_SILENCE]],
        labels=[[IGNORED_LABEL, SILENCE, 9, SILENCE]],
    )
    objective = StreamingLoss(ObjectiveConfig(weights={"idle_silence": 0.1, "stop_silence": 0.1}))
    logits = torch.zeros(4, 1, VOCABULARY)
    expected = (0.1 + 1.0 + 0.1) * math.log(VOCABULARY) / 3
    totals = objective.totals(batch)
    assert totals[Total.LABELS] == 3
    assert objective(logits, batch, totals).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normaliser", ["valid", "weights"])
def test_any_split_into_microbatches_gives_the_same_loss_and_gradient(normaliser):
    objective = StreamingLoss(ObjectiveConfig(weights=WEIGHTS, focal_gamma=2.0, normaliser=normaliser))
    batch = random_batch(5)
    whole, split = random_logits(5, batch), random_logits(5, batch)
    objective(whole, batch, objective.totals(batch)).loss.backward()
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    totals = sum(objective.totals(rows_of(batch, part)) for part in parts)
    losses = [objective(split[:, part], rows_of(batch, part), totals).loss for part in parts]
    sum(losses).backward()
    torch.testing.assert_close(totals, objective.totals(batch))
    torch.testing.assert_close(split.grad, whole.grad)


@pytest.mark.parametrize("normaliser", ["valid", "weights"])
def test_a_microbatch_without_labels_is_zero_and_keeps_its_graph(normaliser):
    batch = batch_of(kinds=[[0, 0, 0]], labels=[[IGNORED_LABEL] * 3])
    objective = StreamingLoss(ObjectiveConfig(normaliser=normaliser, focal_gamma=2.0), silence_id=SILENCE)
    logits = random_logits(0, batch)
    output = objective(logits, batch, objective.totals(batch))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert output.decisions.sum() == 0


def test_a_sample_masked_by_the_loader_is_as_if_absent():
    batch = random_batch(6)
    masked = random_batch(6)
    masked.weights_RT[2:] = 0.0
    objective = StreamingLoss(ObjectiveConfig())
    logits = random_logits(6, batch)
    kept = rows_of(batch, slice(0, 2))
    expected = objective(logits[:, :2], kept, objective.totals(kept)).loss
    torch.testing.assert_close(objective(logits, masked, objective.totals(masked)).loss, expected)


def test_numbers_at_untrained_positions_do_not_matter():
    batch = batch_of(kinds=[[Kind.TEXT, Kind.IGNORED]], labels=[[7, IGNORED_LABEL]])
    logits = torch.zeros(2, 1, VOCABULARY)
    logits[1] = float("nan")
    logits.requires_grad_()
    objective = StreamingLoss(ObjectiveConfig())
    output = objective(logits, batch, objective.totals(batch))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(math.log(VOCABULARY))
    assert logits.grad.isfinite().all()


def test_low_precision_logits_are_lifted_before_the_softmax_and_not_changed():
    batch = random_batch(7)
    logits = random_logits(7, batch).detach().bfloat16()
    before = logits.clone()
    objective = StreamingLoss(ObjectiveConfig())
    output = objective(logits, batch, objective.totals(batch))
    lifted = objective(logits.float(), batch, objective.totals(batch))
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, lifted.loss)
    assert torch.equal(before, logits)


def test_sums_per_kind_rebuild_the_loss():
    batch, objective = random_batch(8), StreamingLoss(ObjectiveConfig(weights=WEIGHTS, focal_gamma=2.0))
    totals = objective.totals(batch)
    output = objective(random_logits(8, batch), batch, totals)
    assert output.per_kind_count.sum() == totals[Total.LABELS]
    assert output.per_kind_count[Kind.IGNORED] == 0
    for kind in Kind:
        count = ((batch.kinds_RT == kind) & (batch.labels_RT != IGNORED_LABEL)).sum()
        assert output.per_kind_count[kind] == count
    assert (output.per_kind_mass.sum() / totals[Total.LABELS]).item() == pytest.approx(output.loss.item(), rel=1e-6)
    assert not output.per_kind_sum.requires_grad


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ObjectiveConfig(weights={"silence": 0.1}), "objective.weights.silence"),
        (ObjectiveConfig(weights={"text": -1.0}), "objective.weights.text"),
        (ObjectiveConfig(weights={"text": float("nan")}), "objective.weights.text"),
        (ObjectiveConfig(focal_gamma=-0.5), "objective.focal_gamma"),
        (ObjectiveConfig(normaliser="tokens"), "objective.normaliser"),
        (ObjectiveConfig(balance="class"), "objective.balance"),
        (ObjectiveConfig(frame_position_weight=-1.0), "objective.frame_position_weight"),
        (ObjectiveConfig(decision_head_weight=float("inf")), "objective.decision_head_weight"),
        (ObjectiveConfig(margin=float("nan")), "objective.margin"),
        (ObjectiveConfig(margin_weight=-0.1), "objective.margin_weight"),
        (ObjectiveConfig(weights=dict.fromkeys(WEIGHTS, 0.0)), "objective.weights"),
    ],
)
def test_illegal_values_are_refused_by_name(config, field):
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        StreamingLoss(config)
