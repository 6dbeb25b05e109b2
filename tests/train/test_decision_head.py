"""A decision head in a run: begun from weights without one, saved, gone on with, used, left out of an export."""

import json

import pytest
import torch
from run_jobs import newest, rows
from small_runs import small_overrides

from moss_train.cli import main
from moss_train.data.collate import collate
from moss_train.data.corpus import load_source
from moss_train.engines.megatron import MegatronEngine
from moss_train.errors import CheckpointError, ConfigError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.judges import load_judge
from moss_train.evaluate.runner import evaluate_streams
from moss_train.report.metrics_file import FILE_NAME
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline
from moss_train.train.restore import load_model

HEAD = ("model/decision_head.bias", "model/decision_head.weight")


def train(overrides: list[str], output, *more: str) -> int:
    return run_pipeline(compose_run([*overrides, f"output_dir={output}", *more]))


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    """A run without a head, and one whose real-time stage begins from it with a head."""
    without, output = (tmp_path_factory.mktemp(name) for name in ("without", "with"))
    overrides = small_overrides(packed)
    assert train(overrides, without, "~stages.realtime", "stages.align.steps=2", "stages.align.save_every=0") == 0
    begun = ["~stages.align", f"stages.realtime.init={without}", "model.decision_head=true",
             "stages.realtime.objective=dispider", "stages.realtime.steps=4"]  # fmt: skip
    assert train(overrides, output, *begun) == 0
    return without, output, [*overrides, *begun]


def test_weights_without_a_head_begin_a_model_with_one_and_the_log_says_so(trained):
    without, output, _ = trained
    events = [json.loads(line) for line in (output / FILE_NAME).read_text().splitlines()]
    (begun,) = [event for event in events if event.get("event") == "starts_fresh"]
    assert begun["weights"] == ", ".join(HEAD) and str(without) in begun["because"]
    weights = newest(output).tensors
    assert not set(HEAD) & set(newest(without, "align").tensors)
    assert all(weights[name].abs().max() > 0 for name in HEAD)
    assert weights["optimizer/decision_head.weight/exp_avg"].abs().max() > 0


def test_the_log_tells_the_head_and_the_calibration(trained):
    _, output, _ = trained
    first, *_, last = [metrics for (stage, _), metrics in rows(output).items() if stage == "realtime"]
    assert first["decision_head/loss"] == pytest.approx(0.6931, abs=1e-3)  # zeros: ln 2 for every decision
    assert first["decision_head/calibration/bin_5/expected"] * 2 == first["decision_head/calibration/bin_5/count"]
    for metrics in first, last:
        assert 0 <= metrics["calibration/error"] <= 1 and 0 < metrics["share/silence"] < 1
        assert metrics["share/silence"] == pytest.approx(metrics["share/idle_silence"] + metrics["share/stop_silence"])
        bins = [name for name in metrics if name.startswith("calibration/bin_") and name.endswith("/count")]
        assert sum(metrics[name] for name in bins) > 0


def test_a_killed_run_with_a_head_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    _, output, overrides = trained
    step = MegatronEngine.train_step

    def dying(engine, *arguments):
        if engine.step == 3:
            raise RuntimeError("the machine is gone")
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MegatronEngine, "train_step", dying)
        with pytest.raises(RuntimeError, match="machine"):
            train(overrides, tmp_path)
    assert newest(tmp_path).step == 2
    assert train(overrides, tmp_path) == 0
    ours, theirs = newest(tmp_path).tensors, newest(output).tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in HEAD)


def test_a_head_that_is_not_trained_is_no_objective(trained, tmp_path):
    """A recipe that lists its groups would else train with the head's loss and leave the head at zeros."""
    with pytest.raises(ConfigError, match=r"stages\.realtime\.trainable=.*add decision_head"):
        train(trained[2], tmp_path, "stages.realtime.trainable=[cross_layers,self_layers,head]")


def test_a_head_is_not_dropped_unasked(trained, tmp_path):
    _, output, overrides = trained
    changed = [text for text in overrides if not text.startswith(("model.decision_head", "stages.realtime.objective"))]
    with pytest.raises(CheckpointError, match="unexpected model/decision_head.weight"):
        train(changed, tmp_path, f"stages.realtime.init={output}")


def evaluated(model, tokenizer, run, decode: DecodeConfig):
    compiler = run.stages["realtime"].compiler
    corpus = load_source(run.evaluate.source, tokenizer, compiler, run.model.vision.image_size)
    judge = load_judge(run.evaluate.judge)
    return evaluate_streams(model, corpus, tokenizer, compiler, judge, EvaluationConfig(limit=2), decode)


@pytest.mark.parametrize(("bias", "threshold", "speaks"), [(3.0, None, True), (-3.0, None, False), (3.0, 0.99, False)])
def test_the_head_decides_at_frames(trained, bias, threshold, speaks):
    model, tokenizer, run = load_model(trained[1])
    with torch.no_grad():
        model.decision_head.weight.zero_()
        model.decision_head.bias.fill_(bias)
    result = evaluated(model, tokenizer, run, DecodeConfig(decide_by="head", head_threshold=threshold))
    probability = 1 / (1 + torch.tensor(bias).exp().item())
    for transcript in result.transcripts:
        running = False
        for slot in transcript.slots:
            running &= not slot.opens_turn
            if not running and not slot.opens_turn:
                assert (slot.state == "speak") == speaks
                assert slot.silence_probability == pytest.approx(probability, abs=1e-6)
            running = slot.state in ("speak", "continue") and not slot.ends
    decisions = 0
    for transcript in result.teacher_forced_transcripts:
        for slot in transcript.slots:
            if not slot.opens_turn and slot.reference_state != "continue":
                decisions += 1
                assert slot.speaks == speaks and bool(slot.text) == speaks
                assert slot.silence_probability == pytest.approx(probability, abs=1e-6)
        assert all((rolled.spoke_after == 1) == speaks for rolled in transcript.rolled)
    assert decisions > 10


def test_the_head_says_the_same_token_by_token_as_at_once(trained):
    model, tokenizer, run = load_model(trained[1])
    compiler = run.stages["realtime"].compiler
    corpus = load_source(run.evaluate.source, tokenizer, compiler, run.model.vision.image_size)
    stream, frames = corpus.compile(0), corpus.all_frames(0)
    whole_TR = model.predictions(collate([[(stream, frames)]])).decisions_TR
    length = len(stream.ids)
    state = model.start_streams(1, length, len(frames))
    assert state.decisions_RL is None
    rows_N = torch.zeros(len(frames), dtype=torch.long)
    model.add_frames(state, frames, rows_N, torch.from_numpy(stream.frame_positions).long())

    def row(values) -> torch.Tensor:
        return torch.from_numpy(values).long()[None]

    with torch.inference_mode():
        for start, end in ((0, length // 2), (length // 2, length)):
            part = slice(start, end)
            ids, positions = row(stream.ids[part]), row(stream.positions[part])
            model.extend(state, ids, positions, torch.tensor([end - start]), visible_lo_RL=row(stream.visible_lo[part]),
                         visible_hi_RL=row(stream.visible_hi[part]), sinks=stream.sinks)  # fmt: skip
            torch.testing.assert_close(state.decisions_RL[0], whole_TR[part, 0].detach(), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_cannot_decide_by_it(trained):
    model, tokenizer, run = load_model(trained[0])
    run.stages["realtime"] = run.stages["align"]
    with pytest.raises(ConfigError, match="decode.decide_by=head: the model has no decision head"):
        evaluated(model, tokenizer, run, DecodeConfig(decide_by="head"))


def test_an_export_leaves_it_out_and_says_so(trained, tmp_path, capsys):
    assert main(["convert", "export", f"ckpt={trained[1]}", f"out={tmp_path / 'out'}"]) == 0
    assert "its decision head is left out" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if "decision" in name]
