"""However streams are dealt and laid in rows, the loss, its parts by kind and source, and every gradient stay."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_cases import tiny_config

from moss_train.bench.equivalence.streams import IMAGE_SIZE, MAX_FRAMES, MAX_TOKENS, global_batch
from moss_train.data.collate import collate
from moss_train.data.config import CostConfig
from moss_train.data.packing import RowLimits, plan_rows
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TokenizerConfig())


def measured(model, batches, objective) -> tuple[LossFigures, dict[str, torch.Tensor]]:
    """Figures and gradients of microbatches that make up one global batch."""
    model.zero_grad()
    totals = sum(objective.totals(batch) for batch in batches)
    outputs = []
    for batch in batches:
        outputs.append(objective(model(batch), batch, totals))
        outputs[-1].loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return LossFigures.from_statistics(statistics(outputs), objective.sources), gradients


@given(
    st.sampled_from(["any", "any_windowed"]),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([(MAX_TOKENS, MAX_FRAMES), (2 * MAX_TOKENS, 4 * MAX_FRAMES)]),
    st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_rows_on_any_ranks_equal_streams_alone(build, diet, seed, ranks, rows, budget, gamma):
    model = build(text=replace(tiny_config().text, vocabulary_size=TOKENIZER.vocabulary_size))
    objective = StreamingLoss(ObjectiveConfig(focal_gamma=gamma), TOKENIZER.special.silence, ("even", "odd"))
    streams = global_batch(diet, seed, 0)
    alone = [collate([[pair]], IMAGE_SIZE, origins=[[number % 2]]) for number, pair in enumerate(streams)]
    tokens, frames = [len(s.ids) for s, _ in streams], [len(s.frames) for s, _ in streams]
    plan = plan_rows(tokens, frames, RowLimits(*budget, rows, pack=True), CostConfig(), ranks)
    packed = [
        collate([[streams[s] for s in row] for row in mine], IMAGE_SIZE, origins=[[s % 2 for s in row] for row in mine])
        for own in plan
        for mine in own
        if mine
    ]
    expected, expected_gradients = measured(model, alone, objective)
    found, gradients = measured(model, packed, objective)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.per_kind == pytest.approx(expected.per_kind, rel=1e-5)
    assert found.per_source == pytest.approx(expected.per_source, rel=1e-5)
    assert (found.per_kind_count, found.per_source_count) == (expected.per_kind_count, expected.per_source_count)
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference <= 5e-5 * max(expected_gradients[name].norm(), 1e-4 * whole), name


def test_the_loss_of_a_source_is_the_mean_over_its_labels(build):
    model = build(text=replace(tiny_config().text, vocabulary_size=TOKENIZER.vocabulary_size))
    objective = StreamingLoss(ObjectiveConfig(), TOKENIZER.special.silence, ("a", "b", "absent"))
    streams = global_batch("mixed", 3, 0)[:4]
    rows = [streams[:2], streams[2:]]
    both, _ = measured(model, [collate(rows, IMAGE_SIZE, origins=[[0, 1], [1, 0]])], objective)
    for name, numbers in (("a", (0, 3)), ("b", (1, 2))):
        alone, _ = measured(model, [collate([[streams[n]] for n in numbers], IMAGE_SIZE)], objective)
        labels = sum(alone.per_kind_count.values())
        mean = sum(alone.per_kind[kind] * count for kind, count in alone.per_kind_count.items()) / labels
        assert both.per_source[name] == pytest.approx(mean, rel=1e-6) and both.per_source_count[name] == labels
        assert alone.per_source == {}
    assert set(both.per_source) == {"a", "b"}
