"""All three loaders deliver the same pictures, the verb prints every figure, and a wrong one does not pass."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from moss_train.bench import data
from moss_train.bench.data_loading import loaders, measure, sources
from moss_train.bench.data_loading.measure import RunFigures
from moss_train.cli_options import parse_options
from moss_train.errors import ConfigError, DataError

pytest.importorskip("av")  # before decord, see `data.decoding.decord_reader`
pytest.importorskip("decord")
pytest.importorskip("megatron.energon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench_data")


@pytest.fixture(scope="module")
def printed(folder):
    """A quick run of two parts: its exit code and last line."""
    return quick_run(folder, "realtime,planning")


def quick_run(folder, cases: str) -> tuple[int, dict]:
    with io.StringIO() as out, contextlib.redirect_stdout(out):
        chosen = [f"out={folder}", "quick=true", "size=96", f"cases={cases}"]
        code = data.data_command(parse_options(data.DataOptions, chosen))
        return code, json.loads(out.getvalue().splitlines()[-1])


def test_the_figures_of_a_quick_run(printed):
    code, result = printed
    assert (code, result["failures"], result["name"], result["ok"]) == (0, [], "bench data", True)
    assert {"vs_webdataset", "vs_energon", "text_padding", "frame_padding"} <= set(result["figures"])
    assert 0 <= result["figures"]["text_padding"] < 1 and result["figures"]["plan_ms"] > 0


@pytest.mark.slow
def test_every_figure_is_printed(folder):
    code, result = quick_run(folder, "all")
    ratios = [f"vs_{other}{case}" for other in ("webdataset", "energon") for case in data.LEAST]
    others = ["text_padding", "frame_padding", "imbalance_64", "plan_ms", "data_wait"]
    assert (code, result["failures"]) == (0, []) and set(ratios + others) <= set(result["figures"])


@pytest.fixture(scope="module")
def blend(folder, printed):
    """The case `realtime` of the quick run."""

    def never(source, out):
        raise AssertionError("everything is made already")

    return sources.make_cases(folder / "quick", sources.QUICK, ["realtime"], never, print)[0]


def test_shares_of_two_ranks_are_all_pictures(blend, folder):
    figures = measure.run_case(loaders.OURS, blend, 96, folder, signatures=True)
    assert figures.frames == blend.frames > 3 and figures.cpu_s > 0
    parts = [np.load(folder / f"ours-realtime-{rank}.npz") for rank in range(2)]
    assert all(len(part.files) for part in parts)
    whole = measure.delivered(loaders.OURS, blend, folder)
    assert sum(map(len, whole.values())) == blend.frames
    (folder / "ours-realtime-1.npz").unlink()
    np.savez(folder / "ours-realtime-1.npz")
    with pytest.raises(DataError, match="were not delivered"):
        measure.delivered(loaders.OURS, blend, folder)


def test_another_picture_is_noticed(blend, folder):
    measure.run_case(loaders.WEBDATASET, blend, 96, folder, signatures=True)
    right = measure.delivered(loaders.WEBDATASET, blend, folder)
    asked = blend.requests["stream0"]
    later = replace(asked, times=tuple(time + 0.5 for time in asked.times))
    wrong = replace(blend, requests=blend.requests | {"stream0": later})
    measure.run_case(loaders.WEBDATASET, wrong, 96, folder, signatures=True)
    shown = measure.delivered(loaders.WEBDATASET, wrong, folder)
    assert measure.largest_difference(right, shown, right) > data.SAME_PICTURES
    assert measure.largest_difference(right, shown, set(right) - {"stream0"}) == 0


def test_a_rank_that_fails_is_told(blend, folder, monkeypatch):
    def broken(case, size, rank):
        raise RuntimeError("planted")
        yield

    monkeypatch.setitem(loaders.RUNS, loaders.OURS, broken)
    with pytest.raises(DataError, match=r"ours on realtime, rank 0[^$]*planted"):
        measure.run_case(loaders.OURS, blend, 96, folder)


def test_ratios_are_of_medians_without_start_up():
    def runs(*cpu_s: float) -> list[RunFigures]:
        return [RunFigures(one, 1.0, 1, 1) for one in cpu_s]

    measured = {
        "startup": {"ours": runs(1, 1, 9), "webdataset": runs(0.5), "energon": runs(2)},
        "short": {"ours": runs(3, 2, 100), "webdataset": runs(4.5), "energon": runs(4)},
        "realtime": {"ours": runs(4), "webdataset": runs(7), "energon": runs(10)},
    }
    figures = data.ratios(measured)
    assert figures == {
        "vs_webdataset.short": 2.0, "vs_energon.short": 1.0, "vs_webdataset": 3.0, "vs_energon": 3.0,
    }  # fmt: skip


def test_targets():
    good = {f"vs_energon{case}": least for case, least in data.LEAST.items()} | data.MOST
    assert data.missed(good) == []
    for name, value in good.items():
        worse = value * (0.9 if name.startswith("vs_") else 1.1)
        assert [text.partition(":")[0] for text in data.missed(good | {name: worse})] == [name]
    assert data.missed({"vs_energon": float("nan")})


def test_lengths_of_the_blend():
    seconds = sources.stream_seconds(4000, 0)
    assert 28 < np.median(seconds) < 32 and seconds.min() >= 6 and seconds.max() <= 256
    assert abs(np.log(seconds).std() - 0.7) < 0.05


@pytest.mark.parametrize("wrong", ["repeats=0", "size=3", "cases=sparse,nothing"])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        parse_options(data.DataOptions, [wrong])
