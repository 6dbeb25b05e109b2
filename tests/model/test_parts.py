"""How layers are cut into pipeline chunks, and that a part of the model starts with the whole one's weights."""

import itertools

import pytest
import torch
from model_cases import tiny_config

from moss_train.errors import ConfigError
from moss_train.model import parts
from moss_train.model.build import fresh_weights
from moss_train.model.config import ModelConfig, TextConfig
from moss_train.model.layout_rules import check_layout
from moss_train.model.video_model import VideoModel
from moss_train.parallel.config import LayoutConfig


def dearest(sizes, costs, first, last):
    """Cost of the dearest chunk of a split."""
    ends = list(itertools.accumulate(sizes, initial=0))
    sums = [sum(costs[start:end]) for start, end in itertools.pairwise(ends)]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (2.5, 0.0), (50.0, 1.0), (0.0, 7.0)])
def test_the_split_is_as_good_as_any(chunks, first, last):
    generator = torch.Generator().manual_seed(chunks)
    costs = (torch.rand(8, generator=generator) + 0.5).tolist()
    found = parts._balanced(costs, chunks, first, last)
    assert len(found) == chunks and sum(found) == len(costs)
    least = 0 if first else 1
    splits = [
        sizes
        for sizes in itertools.product(range(len(costs) + 1), repeat=chunks)
        if sum(sizes) == len(costs) and sizes[0] >= least and all(size >= 1 for size in sizes[1:])
    ]
    best = min(dearest(sizes, costs, first, last) for sizes in splits)
    assert dearest(found, costs, first, last) == pytest.approx(best)


def test_layers_of_one_kind_are_split_evenly():
    config = ModelConfig(text=TextConfig(layers=8, cross_layers=[], vocabulary_size=0))
    assert parts.split_layers(config, LayoutConfig(pp=4)) == [2, 2, 2, 2]
    assert parts.split_layers(config, LayoutConfig(pp=2, vpp=2)) == [2, 2, 2, 2]


def test_the_tower_costs_the_first_stage_layers_unless_all_stages_encode():
    config = ModelConfig()
    spread = parts.split_layers(config, LayoutConfig(pp=4))
    alone = parts.split_layers(config, LayoutConfig(pp=4, frame_shard="tp"))
    assert alone[0] < spread[0] and sum(alone) == sum(spread) == config.text.layers


def test_stages_hold_their_chunks_and_what_stands_at_the_ends():
    config = tiny_config()  # five layers
    layout = LayoutConfig(pp=2, vpp=2, pipeline_split=[0, 2, 2, 1])
    first, last = (parts.part_of(config, layout, rank) for rank in range(2))
    assert first == parts.ModelPart(encoder=True, embedding=True, chunks=((0, 0), (2, 4)), head=False)
    assert last == parts.ModelPart(encoder=True, embedding=False, chunks=((0, 2), (4, 5)), head=True)
    alone = LayoutConfig(pp=2, vpp=2, pipeline_split=[0, 2, 2, 1], frame_shard="tp")
    assert not parts.part_of(config, alone, 1).encoder


def test_with_dualpipev_microbatches_come_back_to_the_first_stage():
    layout = LayoutConfig(pp=2, pipeline_schedule="dualpipev", pipeline_split=[1, 2, 1, 1])
    first, last = (parts.part_of(tiny_config(), layout, rank) for rank in range(2))
    assert first == parts.ModelPart(encoder=True, embedding=True, chunks=((0, 1), (4, 5)), head=True)
    assert last == parts.ModelPart(encoder=True, embedding=False, chunks=((1, 3), (3, 4)), head=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_weights_are_those_of_the_whole_model(parallel_state, dtype):
    torch.manual_seed(5)
    whole = dict(VideoModel(tiny_config(), parallel_state.tensor_group, dtype).named_parameters())
    drawn = dict(fresh_weights(tiny_config(), parallel_state.own_group, dtype, seed=5))
    assert drawn.keys() == whole.keys()
    assert all(torch.equal(drawn[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        (LayoutConfig(tp=4), 4, r"layout\.tp=4: does not divide model\.text\.attention_heads=6; legal values are 1, 2"),
        (LayoutConfig(tp=3), 3, r"layout\.tp=3: does not divide model\.text\.key_value_heads=2"),
        (LayoutConfig(pp=6), 6, r"layout\.pp=6.*model\.text\.layers=5.*layout\.pp to 5"),
        (LayoutConfig(pp=3, pipeline_schedule="dualpipev"), 3, r"makes 6 chunks .*set layout\.pipeline_schedule=auto"),
        (LayoutConfig(pp=2, vpp=3), 2, r"makes 6 chunks of model\.text\.layers=5"),
        (LayoutConfig(pp=2, pipeline_split=[2, 2]), 2, r"adds up to 4, but model\.text\.layers=5"),
        (LayoutConfig(pp=2, vpp=2, batch_p2p=True), 2, r"layout\.batch_p2p=true"),
    ],
)
def test_layouts_that_the_model_cannot_have_are_refused(layout, processes, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(tiny_config(), layout, processes)


def test_more_chunks_than_layers_are_legal_when_given_by_hand():
    check_layout(tiny_config(), LayoutConfig(pp=6, pipeline_split=[0, 1, 1, 1, 1, 1]), 6)


def test_the_dense_backend_knows_no_shared_frames():
    with pytest.raises(ConfigError, match=r"model\.attention=dense"):
        check_layout(tiny_config(attention="dense"), LayoutConfig(cp=2), 2)
