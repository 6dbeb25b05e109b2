"""`moss-train bench stream`: what it prints, what it asks for, and that both sides do the work."""

import json

import pytest
import torch

from moss_train.bench.stream import AT_LEAST, AT_MOST, StreamOptions, stream_command, verdict
from moss_train.bench.stream_ours import CrossAttending
from moss_train.bench.stream_theirs import DecoderOnly
from moss_train.cli_options import parse_options
from moss_train.errors import ConfigError
from moss_train.parallel import groups

#: design §7
NAMES = {
    "ttft_mid_ratio", "ttft_mid_ratio.incremental", "ttft_cold_ratio", "ttft_cold_ratio.with_tower", "tps_ratio",
    "frame_latency_growth",
}  # fmt: skip


def test_a_quick_run_prints_all_figures(capsys):
    assert stream_command(parse_options(StreamOptions, ["quick=true", "threads=1"])) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["ok"] and result["name"] == "bench stream" and not result["failures"]
    figures = result["figures"]
    assert figures.keys() >= NAMES | {"total_ratio", "frame_latency_growth.unbounded", "cache_growth"}
    assert all(value > 0 for value in figures.values())
    assert figures["cache_growth"] == 1.0 and figures["unbounded.cache_mb"] > figures["windowed.cache_mb"]


def test_targets_are_judged():
    figures = dict.fromkeys(NAMES | {"cache_growth"}, 1.0) | AT_LEAST
    assert verdict(figures, judged=True)["ok"]
    for name in (*AT_LEAST, *AT_MOST):
        worse = figures | {name: figures[name] * (0.9 if name in AT_LEAST else 1.2)}
        result = verdict(worse, judged=True)
        assert not result["ok"] and name in result["failures"][0]
        assert verdict(worse, judged=False)["ok"]


def test_both_sides_hold_what_they_should():
    """Keys and values of every layer for every token or frame, and a decoder of the same size."""
    sizes = StreamOptions(quick=True).sized()
    device = torch.device("cpu")
    ours = CrossAttending(sizes, groups.initialize().tensor_group, device, torch.float32)
    theirs = DecoderOnly(sizes, device, torch.float32)
    assert ours.parameters == pytest.approx(theirs.parameters, rel=0.01)
    theirs.cold(theirs.prepare(sizes.frames))
    head = sizes.hidden // sizes.heads
    prompt = sizes.prompt_before + sizes.question
    tokens = prompt + sizes.frames * sizes.their_vision_tokens
    assert theirs.cache_bytes == sizes.layers * tokens * 2 * sizes.key_value_heads * head * 4
    theirs.question()
    theirs.forget(sizes.question)
    assert theirs.cache_bytes == sizes.layers * tokens * 2 * sizes.key_value_heads * head * 4
    ours.cold(ours.prompt(sizes.frames))
    ours.decode(3)
    assert ours._state.tokens_R.tolist() == [prompt + sizes.frames + 3]
    assert ours._state.frames_R.tolist() == [sizes.frames]
    groups.shutdown()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("far=100", "far=100"),
        ("heads=7", "heads=7"),
        ("cross_layers=[9]", "cross_layers"),
        ("new_tokens=1", "new_tokens=1"),
        ("device=tpu", "device"),
    ],
)
def test_illegal_options(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(StreamOptions, [argument])
