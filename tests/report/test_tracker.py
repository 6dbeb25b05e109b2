"""Metrics reach every sink, survive interruptions, and carry no secrets."""

import io
import json
import math
import sys

import pytest
import torch
from rich.console import Console

from moss_train.errors import ConfigError, DataError
from moss_train.redact import HIDDEN, covered, is_secret_key, redact
from moss_train.report.config import TrackingConfig
from moss_train.report.console import ConsoleSink, clock, count
from moss_train.report.metrics_file import FILE_NAME, MetricsRow, read_metrics
from moss_train.report.tracker import JsonlSink, Tracker

QUIET = TrackingConfig(wandb="disabled", console=False)


def put(tracker: Tracker, step: int, loss: float = 1.0) -> None:
    tracker.record_metric("loss", loss)
    tracker.commit(step)


def test_values_are_reduced_over_the_interval(tmp_path):
    with Tracker(QUIET, tmp_path, "run") as tracker:
        tracker.start_stage("sft", 4)
        for value in (1.0, torch.tensor(3.0)):
            for reduce in ("mean", "sum", "min", "max", "last", "rate"):
                tracker.record_metric(reduce, value, reduce=reduce)
        row = tracker.commit(2)
        assert {name: row[name] for name in ("mean", "sum", "min", "max", "last")} == {
            "mean": 2.0,
            "sum": 4.0,
            "min": 1.0,
            "max": 3.0,
            "last": 3.0,
        }
        assert row["rate"] > 4.0  # four of them in much less than a second
        assert tracker.commit(3) == {}
        tracker.record_metric("loss", math.nan)
        tracker.commit(4)
    rows = read_metrics(tmp_path / FILE_NAME)
    assert [(row.stage, row.step, row.total) for row in rows] == [("sft", 2, 4), ("sft", 4, 4)]
    assert rows[0].metrics == pytest.approx(row)
    assert math.isnan(rows[1].metrics["loss"])


def test_misuse_is_refused(tmp_path):
    tracker = Tracker(QUIET, tmp_path, "run")
    with pytest.raises(RuntimeError, match="no stage"):
        put(tracker, 1)
    tracker.start_stage("sft", 2)
    with pytest.raises(RuntimeError, match="still open"):
        tracker.start_stage("realtime", 2)
    with pytest.raises(ValueError, match="reduce"):
        tracker.record_metric("loss", 1.0, reduce="median")
    tracker.record_metric("loss", 1.0)
    with pytest.raises(ValueError, match="mean and by sum"):
        tracker.record_metric("loss", 1.0, reduce="sum")
    with pytest.raises(ConfigError, match="tracking.wandb='yes'"):
        Tracker(TrackingConfig(wandb="yes"), tmp_path, "run")


def test_other_processes_write_nothing(tmp_path):
    with Tracker(TrackingConfig(), tmp_path, "run", main=False) as tracker:
        tracker.start_stage("sft", 2)
        put(tracker, 1)
    assert list(tmp_path.iterdir()) == []


def test_resumed_stage_drops_what_was_lost(tmp_path):
    tracker = Tracker(QUIET, tmp_path, "run")
    tracker.start_stage("align", 6)
    for step in range(1, 6):
        put(tracker, step, 10.0 + step)
    # killed after step 5, in the middle of a line; the last checkpoint was of step 3
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"stage": "align", "st')
    tracker = Tracker(QUIET, tmp_path, "run")
    tracker.start_stage("align", 6, step=3)
    put(tracker, 4, 24.0)
    tracker.end_stage()
    tracker.start_stage("sft", 1)
    put(tracker, 1, 31.0)
    tracker.close()
    rows = read_metrics(tmp_path / FILE_NAME)
    assert [(row.stage, row.step, row.metrics["loss"]) for row in rows] == [
        ("align", 1, 11.0),
        ("align", 2, 12.0),
        ("align", 3, 13.0),
        ("align", 4, 24.0),
        ("sft", 1, 31.0),
    ]


def test_stage_that_starts_anew_forgets_its_rows(tmp_path):
    for loss in (1.0, 2.0):
        with Tracker(QUIET, tmp_path, "run") as tracker:
            tracker.start_stage("align", 2)
            put(tracker, 1, loss)
    assert [row.metrics["loss"] for row in read_metrics(tmp_path / FILE_NAME)] == [2.0]


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / FILE_NAME
    sink = JsonlSink(tmp_path)
    sink.write(MetricsRow("sft", 1, 3, 0.0, {"loss": 1.0}))
    with path.open("a") as file:
        file.write("rubbish\n")
    assert len(read_metrics(path)) == 1  # the last line may be a torso
    sink.write(MetricsRow("sft", 2, 3, 0.0, {"loss": 1.0}))
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_missing_wandb_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"moss_train\[wandb\].*tracking.wandb=disabled"):
        Tracker(TrackingConfig(wandb="offline", console=False), tmp_path, "run")


def test_wandb_offline_keeps_the_run_over_a_resume(tmp_path):
    wandb = pytest.importorskip("wandb")
    settings = {"hub_token": "abcdef", "model": {"name": "tiny"}}
    config = TrackingConfig(console=False, jsonl=False)
    for step in (0, 2):
        with Tracker(config, tmp_path, "pipe", settings) as tracker:
            tracker.start_stage("align", 4, step)
            run = wandb.run
            assert (run.group, run.job_type, run.name) == ("pipe", "align", "pipe/align")
            assert run.config["hub_token"] == HIDDEN
            assert run.config["model"]["name"] == "tiny"
            assert run.offline
            ids = json.loads((tmp_path / "wandb_runs.json").read_text())
            assert ids == {"align": run.id}
            put(tracker, step + 1)
            tracker.end_stage()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids['align']}"))) >= 1


def lines_of(*calls) -> str:
    text = io.StringIO()
    sink = ConsoleSink(Console(file=text, width=200, highlight=False))
    for name, *arguments in calls:
        getattr(sink, name)(*arguments)
    return text.getvalue()


def test_console_line_says_where_the_run_stands():
    metrics = {
        "loss": 1.23456,
        "loss/text": 1.0,
        "loss/revision": 2.5,
        "learning_rate": 2e-4,
        "learning_rate/projector": 1e-4,
        "grad_norm": 0.75,
        "tokens_per_s": 3210.0,
        "frames_per_s": 88.0,
        "data_wait": 0.25,
    }
    text = lines_of(("start", "realtime", 400, 0), ("write", MetricsRow("realtime", 120, 400, 0.0, metrics)))
    assert "realtime starts, 400 steps" in text
    for part in (
        "120/400",
        "30%",
        "loss 1.235",
        "text 1",
        "revise 2.5",
        "lr 0.0001…0.0002",
        "grad 0.75",
        "3.21k tok/s",
        "88 fr/s",
        "data 25%",
        "eta",
    ):
        assert part in text, part


def test_console_shows_held_out_figures_and_events():
    text = lines_of(
        ("start", "sft", 10, 4),
        ("write", MetricsRow("sft", 5, 10, 0.0, {"eval/speak_f1": 0.953})),
        ("event", "sft", 5, "checkpoint_saved", {"path": "step-5"}),
        ("finish", False),
    )
    for part in (
        "goes on after step 4",
        "held out  speak f1 0.953",
        "sft      5 checkpoint saved  path step-5",
        "stopped after",
    ):
        assert part in text, part


def test_short_numbers():
    assert [clock(seconds) for seconds in (7.2, 65, 3723)] == ["7 s", "1:05", "1:02:03"]
    assert [count(number) for number in (950, 3210, 1_740_000)] == ["950", "3.21k", "1.74M"]


@pytest.mark.parametrize(
    "key", ["hub_token", "WANDB_API_KEY", "apikey", "password", "aws.secret_access_key", "authToken"]
)
def test_secret_keys(key):
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["tokens_per_second", "tokenizer", "pack_text_tokens", "key", "keys", "max_tokens"])
def test_harmless_keys(key):
    assert not is_secret_key(key)


def test_secrets_are_hidden_and_nothing_else():
    settings = {
        "optim": {"lr": 1e-4, "betas": [0.9, 0.95]},
        "tokenizer": {"special": {"silence_token": "<|silence|>"}},
        "hub_token": "hf_abcdefghijkl",
        "notes": ["ghp_abcdefghijklmnopqrstuvwxyz", "plain"],
        "path": "s3://user:geheim@host/bucket?X-Amz-Signature=abc&part=1",
        "api_key": "",
    }
    assert redact(settings) == {
        "optim": {"lr": 1e-4, "betas": [0.9, 0.95]},
        "tokenizer": {"special": {"silence_token": "<|silence|>"}},
        "hub_token": HIDDEN,
        "notes": [HIDDEN, "plain"],
        "path": f"s3://{HIDDEN}@host/bucket?X-Amz-Signature={HIDDEN}&part=1",
        "api_key": "",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open rtsp://admin:geheim@10.0.0.7:554/live", f"cannot open rtsp://{HIDDEN}@10.0.0.7:554/live"),
        ("'http://me:ge@heim@host/v1' is away", f"'http://{HIDDEN}@host/v1' is away"),
        ("rtsp://admin:ge?heim@cam/1 fails", f"rtsp://{HIDDEN}@cam/1 fails"),
        ("https://geheim@host/a is away", f"https://{HIDDEN}@host/a is away"),
        ("http://cam/a?user=x&password=geheim&fps=2", f"http://cam/a?user=x&password={HIDDEN}&fps=2"),
        ("http://host/v1?api_key=geheim: 404", f"http://host/v1?api_key={HIDDEN} 404"),
        ("'s3://a/b?X-Amz-Signature=geheim' is gone", f"'s3://a/b?X-Amz-Signature={HIDDEN}' is gone"),
        ("key hf_abcdefghijklmnopqrstuvwxyz is refused", f"key {HIDDEN} is refused"),
        ("-----BEGIN RSA PRIVATE KEY-----\ngeheim\ngeheim", HIDDEN),
        ("localhost:8000 and a@b.c at 10:30, http://h:80/a@b?x=1", None),
    ],
)
def test_messages_are_covered_and_stay_readable(text, shown):
    assert covered(text) == (text if shown is None else shown)
