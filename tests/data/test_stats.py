"""`data stats`: every unit is in one bar, packing figures are those of the plan, what is left out is told."""

import re

import numpy as np
import pytest
from data_samples import caption_json, packed_streams, stage, still

from moss_train.cli_options import parse_options
from moss_train.data import stats
from moss_train.data.packing import RowLimits, padding_of, plan_rows
from moss_train.data.shards.pack import pack
from moss_train.errors import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return packed_streams(tmp_path_factory.mktemp("stats"), 12)


def options(*arguments: str) -> stats.StatsOptions:
    return parse_options(stats.StatsOptions, list(arguments))


@pytest.mark.parametrize("values", [[0, 0, 1], [7] * 5, [3, 1000, 2], list(range(300)), [1], [5000, 5001]])
def test_bars_hold_every_value_once(values):
    title, summary, *bars = stats.histogram("x", np.array(values))
    counts = [int(line.split()[-1].replace(",", "")) for line in bars]
    assert title == "x" and f"{min(values):,} … {max(values):,}" in summary.replace(".0", "")
    assert sum(counts) == len(values)
    longest = bars[int(np.argmax(counts))]
    assert longest.count("█") == max(line.count("█") for line in bars) > 0
    # Each bar that stands for something can be seen.
    assert all(("█" in line) == (count > 0) for line, count in zip(bars, counts, strict=True))


def test_edges_are_round_and_reach_the_values():
    for values in ([0.3, 9.7], [1, 2, 3], [99, 4000], [250.0] * 9):
        edges = stats.bins_of(np.array(values))
        steps = np.diff(edges)
        assert edges[0] == 0 and edges[-1] > np.percentile(values, 99) and np.allclose(steps, steps[0])
        assert len(edges) <= 13 and f"{steps[0]:e}"[0] in "125"


def test_the_printed_figures(source, capsys):
    assert stats.stats_command(options(f"path={source}", "ranks=2", "global_batch_size=6", "pack_frames=12")) == 0
    out = capsys.readouterr().out
    assert "12 samples" in out and "stream, 12 units" in out
    assert {"text tokens", "frames", "seconds of video"} <= set(re.findall(r"[a-z]+(?: [a-z]+)*", out))
    assert re.search(r"packing: 6 streams a step over 2 ranks, microbatches of at most 1 row, mean of 2 steps", out)
    # Two streams of six frames fill a row of twelve, which leaves three streams a rank two rows.
    assert re.search(r"streams a row +1\.5\n", out) and re.search(r"rows a rank +2\.0\n", out)
    assert re.search(r"75\.0% of 12 frames", out)


def test_packing_figures_are_those_of_the_plan(source):
    chosen = options(f"path={source}", "ranks=2", "global_batch_size=12", "micro_batch_rows=4", "pack_text_tokens=100")
    opened = stats._open(chosen)
    found = stats.packing_figures(opened, chosen)
    tokens, frames = stats._lengths_of_batch(opened, 0)
    plan = plan_rows(tokens, frames, RowLimits(100, 256, 4, True), chosen.cost, 2)
    padding = padding_of(plan, tokens, frames)
    rows = [row for own in plan for microbatch in own for row in microbatch]
    assert (found.text_padding, found.frame_padding) == pytest.approx((padding.text, padding.frame))
    assert found.text_fill == pytest.approx(sum(tokens) / len(rows) / 100)
    assert found.streams_a_row == pytest.approx(12 / len(rows)) and 1 <= found.imbalance <= 1.2


def test_what_is_left_out_is_told(tmp_path, capsys):
    staging, packed = tmp_path / "staging", tmp_path / "packed"
    for number in range(3):
        stage(staging, f"short{number}", caption_json(f"short{number}"), png=still(number))
    stage(staging, "long", caption_json("long", text="word " * 400), png=still(9))
    stage(staging, "broken", caption_json("broken"), png=b"no picture")
    pack(staging, packed)
    stats.stats_command(options(f"path={packed}", "pack_text_tokens=200", "ranks=1", "global_batch_size=3"))
    out = capsys.readouterr().out
    assert "1 (25.0%) are longer than a row of 200 tokens" in out
    assert "1 do not compile; the first, 'broken'" in out


def test_two_sources_and_a_picture(source, tmp_path, capsys):
    other = packed_streams(tmp_path, 3, prefix="t")
    picture = tmp_path / "figures" / "stats.png"
    stats.stats_command(options(f"path={source},{other}", f"out={picture}", "global_batch_size=5"))
    out = capsys.readouterr().out
    assert "s-packed: 12 samples" in out and "t-packed: 3 samples" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize("wrong", ["ranks=0", "over_budget=drop", "out=x.pdf", "pack_frames=0"])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        options("path=x", wrong)


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match="path"):
        stats.stats_command(options("path="))
