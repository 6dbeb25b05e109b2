"""Layouts that cannot be are refused with the field, its value and a legal one; defaults are resolved."""

import pytest

from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig

LEGAL = [
    (LayoutConfig(), 1),
    (LayoutConfig(), 7),
    (LayoutConfig(tp=2, pp=2, cp=2, sp=True), 16),
    (LayoutConfig(tp=2, dp=3), 6),
    (LayoutConfig(pp=2, vpp=2, pipeline_split=[0, 3, 1, 0]), 2),
    (LayoutConfig(pp=4, vpp=2, batch_p2p=True), 4),
    (LayoutConfig(pp=2, pipeline_schedule="dualpipev", pipeline_split=[1, 2, 2, 1]), 2),
    (LayoutConfig(pp=4, vpp=2, overlap_p2p=True, backend="nccl"), 4),
]

REFUSED = [
    (LayoutConfig(tp=0), 1, r"layout\.tp=0"),
    (LayoutConfig(vpp=2), 2, r"layout\.vpp=2.*layout\.pp above 1"),
    (LayoutConfig(tp=3), 4, r"layout\.tp=3.*4 processes.*nproc-per-node 6"),
    (LayoutConfig(tp=2), 1, r"1 process started.*nproc-per-node 2"),
    (LayoutConfig(dp=2), 3, r"layout\.dp=2.*leave 3"),
    (LayoutConfig(dp=0), 1, r"layout\.dp=0.*or null"),
    (LayoutConfig(zero=4), 1, r"layout\.zero=4.*0 and 1.*deepspeed 2 and 3"),
    (LayoutConfig(sp=True), 1, r"layout\.sp=true.*layout\.tp above 1"),
    (LayoutConfig(frame_shard="rows"), 1, r"layout\.frame_shard='rows'.*model_parallel"),
    (LayoutConfig(backend="mpi"), 1, r"layout\.backend='mpi'.*gloo"),
    (LayoutConfig(pp=2, pipeline_split=[4]), 2, r"pipeline_split=\[4\].*makes 2"),
    (LayoutConfig(pp=2, pipeline_split=[-1, 4]), 2, r"pipeline_split=\[-1, 4\].*at least 0"),
    (LayoutConfig(pp=2, pipeline_schedule="zb"), 2, r"layout\.pipeline_schedule='zb'.*auto, dualpipev"),
    (LayoutConfig(pipeline_schedule="dualpipev"), 1, r"dualpipev: with layout\.pp=1.*layout\.pp above 1"),
    (LayoutConfig(pp=2, vpp=2, pipeline_schedule="dualpipev"), 2, r"layout\.vpp=2.*or layout\.pipeline_schedule=auto"),
    (LayoutConfig(pp=2, pipeline_schedule="dualpipev", pipeline_split=[3, 3]), 2, r"× 2 a process makes 4"),
    (LayoutConfig(pp=2, vpp=2, batch_p2p=True), 2, r"layout\.batch_p2p=true.*silently.*null"),
    (LayoutConfig(pp=2, overlap_p2p=True, backend="nccl"), 2, r"layout\.overlap_p2p=true.*vpp above 1"),
    (LayoutConfig(pp=4, vpp=2, overlap_p2p=True, backend="gloo"), 4, r"layout\.overlap_p2p=true.*gloo"),
    (LayoutConfig(pp=4, vpp=2, overlap_p2p=True, batch_p2p=True), 4, r"overlap_p2p=true.*batch_p2p=true"),
]


@pytest.mark.parametrize(("layout", "processes"), LEGAL)
def test_legal(layout, processes):
    layout.validate(processes)


@pytest.mark.parametrize(("layout", "processes", "message"), REFUSED)
def test_refused(layout, processes, message):
    with pytest.raises(ConfigError, match=message):
        layout.validate(processes)


def test_frames_are_encoded_by_all_stages_when_there_are_several():
    assert LayoutConfig(tp=2).sharding == "tp"
    assert LayoutConfig(pp=2).sharding == "model_parallel"
    assert LayoutConfig(pp=2, frame_shard="tp").sharding == "tp"
    assert LayoutConfig(tp=2, pp=4, cp=3).share_ranks == 24
    assert LayoutConfig(tp=2, pp=4, cp=3, frame_shard="tp").share_ranks == 6


def test_sends_are_batched_unless_that_is_known_to_be_wrong():
    assert LayoutConfig(pp=2).batches_p2p
    assert LayoutConfig(pp=4, vpp=2).batches_p2p
    assert not LayoutConfig(pp=2, vpp=2).batches_p2p
    assert not LayoutConfig(pp=4, vpp=2, overlap_p2p=True).batches_p2p
