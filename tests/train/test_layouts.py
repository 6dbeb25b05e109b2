"""Runs in split layouts from the command line: they train as one process does, go on in another layout, and are refused
before any work when they cannot be."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from run_jobs import largest_difference, newest, rows, train
from small_runs import SMALL

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint.store import latest
from moss_train.cli import main
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline

STEPS = 6  #: of the last stage
#: relative differences after them: float32 sums in another order, and Adam, which divides small gradients by small ones
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-3

#: two key/value heads and four layers, so that there is something to split
SIZES = ["model.text.key_value_heads=2", "model.text.layers=4", "model.text.cross_layers=[1,3]"]
LAST_STAGE_ALONE = ["~stages.align", "~stages.temporal", "~stages.sft"]


@pytest.fixture(scope="module")
def overrides(packed):
    """All four stages, the first three of a step; two evaluations in the last."""
    data = [f"data_root={packed / 'train'}", f"evaluate.source={packed / 'heldout' / 'realtime'}"]
    data += [f"evaluate.offline_source={packed / 'heldout' / 'sft'}", "evaluate.settings.answer_tokens=4"]
    steps = ["stages.*.steps=1", f"stages.realtime.steps={STEPS}", "stages.*.log_every=1", "stages.*.save_every=0"]
    evaluation = ["stages.realtime.eval_every=3", "evaluate.during_training=2"]
    return ["recipe=quickstart", *SMALL, *SIZES, *data, *steps, *evaluation]


@pytest.fixture(scope="module")
def ranks():
    """Forked processes."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory):
    """The output folder of an uninterrupted run on one process."""
    output = tmp_path_factory.mktemp("whole")
    assert run_pipeline(compose_run([*overrides, f"output_dir={output}"])) == 0
    return output


def torchrun(processes: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*command, "-m", "moss_train", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})


def require_same_run(output, whole, stages=("align", "temporal", "sft", "realtime")):
    """Losses, figures and final weights, and the frames that were counted."""
    ours = rows(output)
    theirs = {place: metrics for place, metrics in rows(whole).items() if place[0] in stages}
    assert ours.keys() == theirs.keys()
    for place, metrics in theirs.items():
        found = ours[place]
        assert found["loss"] == pytest.approx(metrics["loss"], rel=LOSS_TOLERANCE), place
        frames_a_token = metrics["frames_per_s"] / metrics["tokens_per_s"]
        assert found["frames_per_s"] / found["tokens_per_s"] == pytest.approx(frames_a_token), place
        for name, value in metrics.items():
            if name.startswith("eval/") and not name.endswith("evaluation_seconds"):
                assert found[name] == pytest.approx(value, rel=1e-3, nan_ok=True), (place, name)
    assert "eval/speak_recall" in ours["realtime", STEPS]
    assert largest_difference(newest(output).tensors, newest(whole).tensors) < WEIGHT_TOLERANCE


def test_four_processes_of_torchrun_stopped_and_resumed_in_another_layout(overrides, whole, ranks, tmp_path):
    layout = ["layout.tp=2", "layout.sp=true", "layout.pp=2", "layout.frame_shard=model_parallel"]
    every_step = "stages.realtime.save_every=1"
    first = torchrun(4, "train", *overrides, *layout, every_step, f"output_dir={tmp_path}")
    try:
        deadline = time.monotonic() + 240
        while latest(tmp_path / "realtime" / "checkpoints") is None:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)  # torchrun hands it on to all
        first.wait(120)
    finally:
        if first.poll() is None:
            first.terminate()
            first.wait(60)
    assert 1 <= newest(tmp_path).step < STEPS

    other = ["layout.pp=2", "layout.vpp=2", "engine.recompute.self_layers=full"]
    assert ranks.run(2, train, [*overrides, *other, f"output_dir={tmp_path}"]) == [0, 0]
    require_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ["layout.tp=2", "layout.sp=true", "layout.zero=1"]),
        (2, ["layout.cp=2", "engine.recompute.cross_layers=selective", "engine.recompute.tower=true"]),
        (4, ["layout.pp=2", "layout.frame_shard=tp", "layout.zero=1"]),
        (2, ["engine=deepspeed", "layout.zero=3", "engine.recompute.tower=true"]),
        (2, ["engine=deepspeed", "layout.pp=2", "layout.zero=1"]),
        (2, ["engine=deepspeed", "layout.pp=2", "layout.pipeline_schedule=dualpipev"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_split_stage_equals_a_whole_one(overrides, whole, ranks, tmp_path, processes, layout):
    start = [*LAST_STAGE_ALONE, f"stages.realtime.init={whole / 'sft'}", f"output_dir={tmp_path}"]
    assert ranks.run(processes, train, [*overrides, *start, *layout]) == [0] * processes
    require_same_run(tmp_path, whole, stages=("realtime",))
    memory = rows(tmp_path)["realtime", 1]
    assert 0 < memory["memory/activations_mb"] < memory["memory/peak_mb"]


@pytest.mark.parametrize(("layout", "published"), [("layout.tp=2", True), ("layout.pp=2", False)])
def test_weights_come_whole_into_the_parts(overrides, whole, ranks, tmp_path, layout, published):
    """From a checkpoint and from Hugging Face's files; in bfloat16, whose float32 originals keep every digit."""
    start = latest(whole / "realtime" / "checkpoints")
    if published:
        options = [f"ckpt={start}", f"out={tmp_path / 'weights'}", "dtype=stored", "shard_bytes=20KB"]
        assert main(["convert", "export", *options]) == 0
        start = tmp_path / "weights"
    still = ["stages.realtime.optim.lr=0", "stages.realtime.steps=1", "precision=bf16", *LAST_STAGE_ALONE]
    output = tmp_path / "run"
    more = [f"stages.realtime.init={start}", f"output_dir={output}"]
    assert ranks.run(2, train, [*overrides, layout, *still, *more]) == [0, 0]
    found, expected = newest(output).tensors, newest(whole).tensors
    names = [name for name in expected if name.startswith("model/")]
    assert all(found[name].dtype == torch.float32 for name in names)
    assert [name for name in names if not torch.equal(found[name], expected[name])] == []


def test_two_processes_stopped_and_resumed_equal_two_that_were_not(overrides, ranks, tmp_path):
    scratch = [*LAST_STAGE_ALONE, "stages.realtime.init=scratch", "stages.realtime.eval_every=0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert ranks.run(2, train, [*overrides, *scratch, f"output_dir={whole}"]) == [0, 0]
    stopping = [*overrides, *scratch, f"output_dir={stopped}"]
    assert ranks.run(2, train, stopping, 4) == [signal.SIGTERM] * 2  # only the last rank hears it, both stop
    assert newest(stopped).step == 4
    assert ranks.run(2, train, stopping) == [0, 0]
    ours, theirs = newest(stopped), newest(whole)
    assert ours.step == theirs.step == STEPS
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert not [name for name in ours.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])]
    assert ours.state["loader"] == theirs.state["loader"]
    for name in ("step", "trained_tokens", "streams"):
        assert ours.state["progress"][name] == theirs.state["progress"][name]


@pytest.mark.parametrize(
    ("processes", "arguments", "expected"),
    [
        (3, ["layout.tp=3"], "layout.tp=3: does not divide model.text.attention_heads=2; legal values are 1, 2"),
        (3, ["layout.tp=2"], "does not divide the 3 processes"),
        (8, ["layout.pp=8"], "set layout.pp to 4 or less"),
        (2, ["layout.pp=2", "layout.vpp=2", "layout.batch_p2p=true"], "layout.batch_p2p=true"),
        (2, ["layout.pp=2", "layout.vpp=2", "layout.overlap_p2p=true", "layout.backend=gloo"], "layout.overlap_p2p"),
        (2, ["layout.pp=2", "layout.pipeline_split=[3,2]"], "layout.pipeline_split=[3, 2]: adds up to 5"),
        (2, ["layout.tp=2", "model.text.vocabulary_size=1001"], "model.text.vocabulary_size=1001"),
        (2, ["layout.tp=2", "tokenizer.vocabulary_size=2001"], "model.text.vocabulary_size=2001"),
        (1, ["layout.sp=true"], "layout.sp=true"),
        (2, ["engine=deepspeed", "layout.pp=2", "layout.zero=3"], "layout.zero=3: with pipeline stages"),
        (
            1, ["engine=deepspeed", "dry_run=true", "engine.deepspeed.zero_optimization.reduce_bucket_sise=5"],
            "engine.deepspeed.zero_optimization.reduce_bucket_sise=5: DeepSpeed knows no such field",
        ),
        (2, ["layout.pp=2", "layout.pipeline_schedule=dualpipev"], "or engine.name=deepspeed"),
        (1, ["layout.pipeline_schedule=dualpipev"], "set layout.pp above 1"),
        (1, ["precision=fp8"], "precision=fp8"),
        (1, ["precision=fp64"], "legal values are fp32, bf16, fp16, fp8"),
        (1, ["layout.zero=1", "stages.sft.optim.name=sgd"], "stages.sft.optim.name=sgd"),
        (1, ["engine.overlap_param_gather=true", "engine.overlap_grad_reduce=true"], "engine.overlap_param_gather"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_layouts_that_cannot_be_are_refused(overrides, tmp_path, monkeypatch, capsys, processes, arguments, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert main(["train", *overrides, *arguments, f"output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
