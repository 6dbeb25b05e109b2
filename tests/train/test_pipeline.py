"""The pipeline on rendered clips: resume is exact, hand-offs are checked before anything is trained."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import small_overrides

from moss_train.checkpoint.store import latest, load_checkpoint
from moss_train.data.synthetic.render import write_video
from moss_train.engines.megatron import MegatronEngine
from moss_train.errors import CheckpointError, ConfigError, DataError
from moss_train.streams.config import AugmentationConfig, CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer
from moss_train.train.compose import compose_run, load_run, resolved_dict
from moss_train.train.evaluate_command import EvaluateOptions, evaluate_command
from moss_train.train.pipeline import run_pipeline
from moss_train.train.pipeline_report import ReportOptions, report_command
from moss_train.train.restore import load_model, stage_of


def train(overrides: list[str], output: Path, *more: str) -> int:
    return run_pipeline(compose_run([*overrides, f"output_dir={output}", *more]))


def final(output: Path, stage: str = "realtime"):
    return load_checkpoint(latest(output / stage / "checkpoints"))


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory):
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert train(small_overrides(packed), output) == 0
    return output


def test_stages_chain_and_leave_their_story(whole):
    align, realtime = final(whole, "align"), final(whole)
    assert (align.step, realtime.step) == (3, 6)
    assert any(not torch.equal(align.tensors[name], realtime.tensors[name]) for name in align.tensors)
    assert {"revision", "modified"} == set(realtime.provenance["git"] or {"revision": 0, "modified": 0})
    assert realtime.provenance["config"]["stages"]["realtime"]["steps"] == 6
    assert realtime.provenance["versions"]["torch"]
    assert yaml.safe_load((whole / "config.yaml").read_text())["name"] == "quickstart"
    assert len(list((whole / "realtime" / "checkpoints").glob("step_*"))) == 2  # `keep`
    assert realtime.state["progress"]["trained_tokens"] > 0


def test_a_run_stopped_and_killed_ends_with_the_same_bits(small, whole, tmp_path, monkeypatch):
    step = MegatronEngine.train_step

    def stopping(engine, *arguments):
        output = step(engine, *arguments)
        if engine._rates.total_steps == 6 and engine.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    def dying(engine, *arguments):
        if engine._rates.total_steps == 6 and engine.step == 5:
            raise RuntimeError("the machine is gone")
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MegatronEngine, "train_step", stopping)
        assert train(small, tmp_path) == signal.SIGTERM
    assert final(tmp_path).step == 3
    with monkeypatch.context() as patch:
        patch.setattr(MegatronEngine, "train_step", dying)
        with pytest.raises(RuntimeError, match="machine"):
            train(small, tmp_path)
    assert final(tmp_path).step == 4
    torch.manual_seed(12345)  # whatever state the new process is in
    assert train(small, tmp_path) == 0

    ours, theirs = final(tmp_path), final(whole)
    assert ours.tensors.keys() == theirs.tensors.keys()
    different = [name for name in ours.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])]
    assert not different
    assert ours.state["loader"] == theirs.state["loader"]
    for name in ("step", "trained_tokens", "streams"):
        assert ours.state["progress"][name] == theirs.state["progress"][name]


def test_a_finished_run_is_left_alone(small, whole, monkeypatch):
    monkeypatch.setattr(MegatronEngine, "train_step", lambda *_: pytest.fail("trained again"))
    assert train(small, whole) == 0


def test_another_seed_trains_other_weights(small, whole, tmp_path):
    train(small, tmp_path, "seed=2", "~stages.realtime")
    name = "model/head.weight"
    assert not torch.equal(final(tmp_path, "align").tensors[name], final(whole, "align").tensors[name])


def test_windows_that_evaluation_does_not_have_are_told(small, tmp_path, capsys):
    drawn = ["stages.realtime.compiler.augment.window_range=[2,3]", "stages.realtime.compiler.window=null"]
    assert train(small, tmp_path / "out", *drawn, "dry_run=true") == 0
    shown = capsys.readouterr().out
    assert "    warning: stages.realtime.compiler.augment.window_range=[2, 3]" in shown and shown.count("warning") == 1
    augment = AugmentationConfig(window_range=[2, 3], text_window_range=[8, 9])
    (text,) = CompilerConfig(window=3, augment=augment).doubts()
    assert "compiler.text_window=null" in text and "all tokens" in text


def test_a_dry_run_writes_nothing(small, tmp_path, capsys):
    assert train(small, tmp_path / "out", "dry_run=true") == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "align: 3 steps × 4 streams" in shown and "realtime: 6 steps" in shown
    assert "layout: tp 1, cp 1, dp 1, pp 1; layers 2\n" in shown and "fp32; recompute: nothing" in shown


def test_a_stage_says_what_its_first_step_took(small, tmp_path, capsys):
    assert train(small, tmp_path, "tracking.console=true", "~stages.realtime", "stages.align.steps=2") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "MB of activations" in line]
    assert len(told) == 1 and told[0].startswith("align    memory")


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_from(small, tmp_path, monkeypatch):
    def without_precision(run):
        resolved = resolved_dict(run)
        del resolved["precision"]
        return resolved

    with monkeypatch.context() as patch:
        patch.setattr("moss_train.train.stage.resolved_dict", without_precision)
        assert train(small, tmp_path, "~stages.realtime") == 0
    assert "precision" not in final(tmp_path, "align").provenance["config"]
    assert train(small, tmp_path, "~stages.realtime") == 0
    with pytest.raises(CheckpointError, match="precision was 'fp32'"):
        train(small, tmp_path, "~stages.realtime", "precision=fp16")


def test_a_trained_model_comes_back(whole):
    model, tokenizer, run = load_model(whole)
    assert stage_of(whole) == "realtime" and run.model.text.vocabulary_size == tokenizer.vocabulary_size
    assert torch.equal(model.head.weight, final(whole).tensors["model/head.weight"])
    assert not model.training


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["stages.realtime.optim.lr=1e-5"], CheckpointError, "stages.realtime.optim.lr was 0.002"),
        (["stages.realtime.steps=9"], CheckpointError, "steps were 6, are 9"),
        (["model.text.mlp_size=48"], CheckpointError, "mlp_size was 32, is 48"),
        (["precision=bf16"], CheckpointError, "precision was 'fp32', is 'bf16'"),
        (["resume=never"], ConfigError, "resume=never"),
    ],
)
def test_a_run_does_not_go_on_as_another(small, whole, overrides, error, expected):
    with pytest.raises(error, match=expected.replace(".", r"\.")):
        train(small, whole, *overrides)


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["stages.align.init=previous"], ConfigError, "stages.align.init=previous"),
        (["stages.realtime.init=nowhere"], CheckpointError, "nowhere: no such checkpoint"),
        (["stages.realtime.trainable=[vision]"], ConfigError, "stages.realtime: .*vision.* groups are"),
        (["stages.realtime.trainable=everything"], ConfigError, "stages.realtime: .*no such preset"),
        (["stages.realtime.optim.group_lr.towr=1"], ConfigError, "stages.realtime: .*group_lr.towr"),
        (
            ["stages.realtime.optim.group_lr.head=1", "stages.realtime.trainable=projector_only"],
            ConfigError,
            "this group is not trained",
        ),
        (["stages.realtime.epochs=1"], ConfigError, "raise epochs to 2.00"),
        (["stages.realtime.data.sources.realtime.path=nowhere"], DataError, "stages.realtime: .*nowhere"),
        (["model.text.vocabulary_size=99"], ConfigError, "model.text.vocabulary_size=99"),
        (["model.text.extra_embedding_rows=0"], ConfigError, "model.text.extra_embedding_rows=0"),
        (["layout.tp=2"], ConfigError, "layout.tp=2"),
    ],
)
def test_hand_offs_are_checked_before_anything_is_trained(small, tmp_path, overrides, error, expected):
    with pytest.raises(error, match=expected):
        train(small, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size_is_refused(small, whole, tmp_path):
    start = f"stages.align.init={whole / 'realtime'}"
    with pytest.raises(CheckpointError, match=r"stages\.align: (?s:.*)missing model/layers\.2"):
        train(small, tmp_path / "out", start, "model.text.layers=3")
    assert train(small, tmp_path / "out", start, "~stages.realtime") == 0


def test_a_damaged_checkpoint_is_refused(small, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole / "align", copy)
    file = next(latest(copy / "checkpoints").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        train(small, tmp_path / "out", f"stages.align.init={copy}")


def test_another_tokenizer_is_refused(small, whole, tmp_path):
    special = load_tokenizer(TokenizerConfig()).special
    swapped = [f"tokenizer.special_ids.silence={special.ellipsis}", f"tokenizer.special_ids.ellipsis={special.silence}"]
    with pytest.raises(CheckpointError, match="another tokenizer"):
        train(small, tmp_path / "out", f"stages.align.init={whole / 'realtime'}", *swapped)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_stage_whose_predecessor_was_trained_anew_is_not_kept(small, copy):
    shutil.rmtree(copy / "align")
    with pytest.raises(CheckpointError, match=r"stages\.realtime: .* was not trained from what .* remove .*realtime"):
        train(small, copy)
    assert not (copy / "align").exists()
    assert train(small, copy, "~stages.realtime", "stages.align.objective.weights.text=2") == 0  # another align
    with pytest.raises(CheckpointError, match=r"remove .*realtime"):
        train(small, copy, "stages.align.objective.weights.text=2")
    shutil.rmtree(copy / "realtime")
    assert train(small, copy, "stages.align.objective.weights.text=2") == 0


def test_another_init_is_not_the_same_stage(small, whole, tmp_path):
    start = f"stages.align.init={whole / 'align'}"
    assert train(small, tmp_path, start, "~stages.realtime") == 0
    with pytest.raises(CheckpointError, match="was not trained from init=scratch"):
        train(small, tmp_path, "~stages.realtime")
    assert train(small, tmp_path, start, "~stages.realtime") == 0


def test_a_run_stands_for_its_last_stage_whatever_the_files_times(copy):
    for file in (copy / "align").rglob("*"):
        os.utime(file, (2**32, 2**32))
    assert stage_of(copy) == "realtime"
    shutil.rmtree(copy / "realtime")
    assert stage_of(copy) == "align"


def test_a_save_killed_between_its_renames_is_still_the_finished_stage(small, copy, monkeypatch):
    newest = latest(copy / "realtime" / "checkpoints")
    newest.rename(newest.with_name(f".replaced-{newest.name}"))
    monkeypatch.setattr(MegatronEngine, "train_step", lambda *_: pytest.fail("trained again"))
    assert train(small, copy) == 0


def test_an_unfinished_run_is_not_reported_on(small, copy):
    checkpoints = copy / "realtime" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000004\n")
    with pytest.raises(CheckpointError, match="realtime stopped at step 4 of 6"):
        report_command(ReportOptions(run=str(copy)))
    shutil.rmtree(copy / "align")
    with pytest.raises(CheckpointError, match="no checkpoint of align"):
        report_command(ReportOptions(run=str(copy)))


def test_a_finished_run_is_reported_on_and_evaluated(small, copy, tmp_path, capsys):
    assert report_command(ReportOptions(run=str(copy), comparisons=1, pictures=1)) == 0
    figures = json.loads((copy / "report.json").read_text())["figures"]
    for prefix in ("", "without_realtime.", "untrained."):
        assert 0 <= figures[f"{prefix}offline_accuracy"] <= 1 and 0 <= figures[f"{prefix}offline_silent_rate"] <= 1
    assert figures["teacher_forced.lm_ppl"] > 1 and figures["n_streams"] == 5

    out = tmp_path / "evaluation"
    limited = {"limit": 2, "answer_tokens": 4}
    options = EvaluateOptions(ckpt=str(copy), out=str(out), invariance=1, pictures=1, settings=limited)
    assert evaluate_command(options) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Decisions", "Language (VideoLLM-online)", "future frames change"))
    figures = json.loads((out / "report.json").read_text())["figures"]
    assert figures["future_frame_deviation"] == 0 and figures["incremental_deviation"] < 1e-5
    assert figures["n_streams"] == 2 and "teacher_forced.fluency" in figures
    assert {path.name for path in out.iterdir()} == {
        "report.json", "report.html", "transcripts.jsonl", "answers.jsonl"
    }  # fmt: skip


def test_a_run_is_evaluated_on_a_public_benchmark(small, whole, tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", np.zeros((16, 32, 32, 3), np.uint8), 4.0)
    entry = {"task": "REC", "video": "clip.mp4", "activity": "jump", "test_info": [{"realtime": 2, "count": 0}]}
    (tmp_path / "ovo.json").write_text(json.dumps([entry, entry | {"video": "none.mp4"}]))
    bench = {"annotations": str(tmp_path / "ovo.json"), "media_root": str(tmp_path)}
    options = EvaluateOptions(ckpt=str(whole), bench="ovo", out=str(tmp_path / "out"), **bench)
    assert evaluate_command(options) == 0
    assert "left out ovo-rec-2: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["figures"]["n_probes"] == 1
    (tmp_path / "ovo.json").write_text(json.dumps([entry | {"video": "none.mp4"}]))
    with pytest.raises(DataError, match="not one question can be asked.*none.mp4"):
        evaluate_command(options)
    with pytest.raises(ConfigError, match="belong together"):
        EvaluateOptions(ckpt=str(whole), bench="ovo").validate()


def test_a_tokenizer_file_that_has_changed_is_refused(small, whole, monkeypatch):
    monkeypatch.setattr(StreamTokenizer, "fingerprint", "another")
    with pytest.raises(CheckpointError, match="tokenizer's fingerprint was .* is 'another'"):
        train(small, whole)


def test_a_runs_configuration_comes_back_without_its_secrets(small, tmp_path):
    key = "hf_abcdefghijklmnopqrstuvwxyz"
    assert train(small, tmp_path, "~stages.realtime", "stages.align.steps=1", f"tracking.project=my {key}") == 0
    assert key not in (tmp_path / "config.yaml").read_text()
    assert load_run(tmp_path).stages["align"].steps == 1
