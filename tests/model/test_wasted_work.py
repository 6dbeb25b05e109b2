"""What nobody reads is not computed: logits without a label, frames seen before."""

import numpy as np
import pytest
import torch
from model_cases import pack, stream

from moss_train.model.distinct_frames import DistinctFrames
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss

ANCHOR = 96


def labelled_batch(seed: int = 0, share: float = 0.3):
    """Packed rows of which `share` of the tokens have a label."""
    rng = np.random.default_rng(seed)
    rows = [[stream(rng, frames=4), stream(rng, frames=2, leading=1)], [stream(rng, frames=5, leading=0)]]
    batch = pack(rows, padding=3)
    chosen = torch.from_numpy(rng.random(batch.ids_RT.shape) < share) & (batch.segments_RT >= 0)
    batch.labels_RT[chosen] = torch.from_numpy(rng.integers(1, 96, int(chosen.sum())))
    batch.weights_RT[0, :5] = 0.0  # a label that the data masks out is none
    return batch


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_only_trained_positions_reach_the_head(build):
    """float32: the same loss and gradients as with logits of every position; the head multiplies K rows."""
    model, batch = build(), labelled_batch()
    objective = StreamingLoss(ObjectiveConfig(weights={"text": 0.5}), anchor_id=ANCHOR)
    totals, rows_seen = objective.totals(batch), []
    model.head.register_forward_hook(lambda module, inputs, output: rows_seen.append(inputs[0].shape[:-1].numel()))
    whole = objective(model.predictions(batch), batch, totals)
    expected = gradients(model, whole.loss)
    few = objective(model.predictions(batch, trained_only=True), batch, totals)
    found = gradients(model, few.loss)
    trained = int(((batch.labels_RT != -100) & (batch.weights_RT > 0)).sum())
    assert rows_seen == [batch.ids_RT.numel(), trained]
    torch.testing.assert_close(few.loss, whole.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(few.per_kind_sum, whole.per_kind_sum, atol=1e-5, rtol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_batch_without_labels_gives_zero_with_a_graph(build):
    """Every rank takes part in the backward pass."""
    model, batch = build(), labelled_batch()
    batch.labels_RT.fill_(-100)
    objective = StreamingLoss(ObjectiveConfig())
    output = objective(model.predictions(batch, trained_only=True), batch, objective.totals(batch))
    found = gradients(model, output.loss)
    assert float(output.loss.detach()) == 0.0
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(not gradient.any() for gradient in found.values())


def test_logits_that_were_not_asked_for_are_not_there(build):
    model, batch = build(), labelled_batch()
    predictions = model.predictions(batch, trained_only=True)
    with pytest.raises(ValueError, match="only trained positions"):
        predictions.logits_TRV  # noqa: B018
    with pytest.raises(ValueError, match="asked for"):
        predictions.read(torch.arange(3), batch.rows, lambda logits, which: (logits,))


@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(focal_gamma=2.0, margin=0.5, margin_weight=0.3)])
def test_logits_exist_for_a_few_positions_at_a_time(build, config):
    """float32: the same loss, figures and gradients; no tensor has more rows of logits than asked for."""
    batch = labelled_batch()
    batch.contrasts_RT[batch.labels_RT == batch.labels_RT.max()] = 7
    objective = StreamingLoss(config, silence_id=5, anchor_id=ANCHOR)
    totals, results = objective.totals(batch), {}
    for at_once in (None, 4):
        model = build()
        model.recompute.head_positions = at_once
        rows: list[int] = []
        model.head.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(len(output[0])))
        output = objective(model.predictions(batch, trained_only=True), batch, totals)
        results[at_once] = (output, gradients(model, output.loss), rows)
    whole, few = results[None], results[4]
    assert len(whole[2]) == 1 and max(few[2]) == 4
    assert sum(few[2]) == 2 * whole[2][0]  # forwards, and again backwards
    for name, value in vars(whole[0]).items():
        torch.testing.assert_close(
            getattr(few[0], name), value, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name, gradient in whole[1].items():
        torch.testing.assert_close(
            few[1][name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_equal_frames_are_encoded_once(build):
    """float32: features of copies are the encoded ones to 1e-6, and their gradients are summed."""
    models = {once: build(encode_once=once) for once in (True, False)}
    batch = labelled_batch()
    batch.frames_NCHW[[2, 5, 9]] = batch.frames_NCHW[[1, 1, 4]]
    encoded = []
    models[True].vision_tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    results = {}
    for once, model in models.items():
        logits = model(batch)
        results[once] = (logits.detach(), gradients(model, logits.square().mean()))
    assert encoded == [batch.frames - 3]
    torch.testing.assert_close(results[True][0], results[False][0], atol=2e-6, rtol=1e-5)
    all_norm = torch.stack([g.norm() for g in results[False][1].values()]).norm()
    for name, gradient in results[False][1].items():
        scale = max(gradient.norm(), 1e-4 * all_norm)  # design §5
        assert (results[True][1][name] - gradient).norm() <= 5e-5 * scale, name


def test_frames_are_told_apart_by_every_byte():
    frames = torch.zeros(4, 3, 6, 6, dtype=torch.uint8)
    frames[1, 2, 5, 5] = 1
    distinct = DistinctFrames.among(frames)
    assert distinct.frame_of_N.tolist() == [0, 1, 0, 0]
    assert torch.equal(distinct.spread(distinct.pixels_DCHW), frames)
    floats = frames[:2].float()
    assert DistinctFrames.among(floats).frame_of_N is None
    assert DistinctFrames.among(frames[:1]).frame_of_N is None
    assert len(DistinctFrames.among(frames[:0]).pixels_DCHW) == 0


def test_encoding_once_can_be_turned_off(build):
    batch = labelled_batch()
    batch.frames_NCHW[1] = batch.frames_NCHW[0]
    model = build(encode_once=False)
    assert model.distinct_frames(batch.frames_NCHW).frame_of_N is None


def test_gradients_of_copies_are_summed_in_float32():
    """300 copies of one frame, each with a gradient of 1."""
    distinct = DistinctFrames(torch.zeros(2, 3, 4, 4), torch.tensor([0] * 300 + [1]))
    features = torch.zeros(2, 5, dtype=torch.bfloat16, requires_grad=True)
    distinct.spread(features).sum().backward()
    assert features.grad.dtype == torch.bfloat16
    assert features.grad[:, 0].tolist() == [300.0, 1.0]  # bfloat16 stops counting at 256
