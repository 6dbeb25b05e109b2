"""Which checkpoint a stage goes on from: the newest, never a damaged one, an older one only when told to."""

import shutil
from pathlib import Path

import pytest
import torch
from resume_jobs import choose, choose_where_one_sees_less, find_where_one_sees_less, restarted_on_one_node
from small_runs import small_overrides

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint.store import checkpoint_digest, latest, load_checkpoint, save_checkpoint, step_directories
from moss_train.errors import CheckpointError, ConfigError
from moss_train.evaluate.metrics import OFFLINE, figure_names
from moss_train.parallel import groups
from moss_train.report.metrics_file import FILE_NAME
from moss_train.report.samples_file import read_samples
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline
from moss_train.train.resume import ResumePoint, resume_points
from moss_train.train.weights import find_checkpoint


def damage(checkpoint: Path) -> None:
    """Flip a bit of its last tensor."""
    file = sorted(checkpoint.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def save(directory: Path, step: int, origin: str | None = None) -> Path:
    return save_checkpoint(directory, step, {"model/x": torch.full((2,), step)}, {"origin": origin}, {"config": {}})


@pytest.fixture(autouse=True)
def _groups():
    groups.initialize()


@pytest.fixture
def three(tmp_path):
    """A stage's checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    return tmp_path


def point(directory: Path, resume: str = "auto") -> ResumePoint:
    return resume_points({"sft": directory}, resume)["sft"]


@pytest.mark.parametrize("resume", ["auto", "fallback"])
def test_the_newest_that_is_whole(three, resume, capsys):
    newest = three / "step_00000006"
    assert point(three, resume) == ResumePoint(newest, 6, checkpoint_digest(newest))
    assert point(three / "nowhere", resume) == ResumePoint()
    assert capsys.readouterr().out == ""


def test_auto_refuses_a_damaged_one_and_says_what_to_do(three):
    damage(three / "step_00000006")
    with pytest.raises(CheckpointError) as error:
        point(three)
    for part in ("stages.sft: ", "step_00000006", ".safetensors", "resume=fallback", "2 older there"):
        assert part in str(error.value)


def test_fallback_tells_what_it_passes_over(three, capsys):
    damage(three / "step_00000006")
    (three / "step_00000004" / "state.json").unlink()
    found = point(three, "fallback")
    assert found.checkpoint == three / "step_00000002" and found.step == 2
    assert [name for name, _ in found.skipped] == ["step_00000006", "step_00000004"]
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("sft: step_00000006 is passed over: ") and "checksum" in first
    assert second.startswith("sft: step_00000004 is passed over: ") and "state.json" in second
    assert third == "sft: goes on from step_00000002, step 2 (resume=fallback)"


@pytest.mark.parametrize("resume", ["auto", "fallback"])
def test_a_stage_of_which_nothing_is_whole_does_not_begin_anew(three, resume):
    for path in step_directories(three).values():
        damage(path)
    with pytest.raises(CheckpointError, match="step_00000006"):
        point(three, resume)


def test_a_pointer_set_back_by_hand_is_followed(three):
    (three / "latest").write_text("step_00000004\n")
    assert point(three).step == 4
    damage(three / "step_00000004")
    assert point(three, "fallback").step == 2  # not 6, which lies after it


@pytest.mark.parametrize("content", ["step_00000099\n", "nonsense"])
def test_a_pointer_to_nowhere(three, content):
    (three / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="latest"):
        point(three)
    found = point(three, "fallback")
    assert found.step == 6 and found.skipped[0][0] == "latest"


def test_a_checkpoint_whose_replacement_was_killed(three):
    newest = three / "step_00000006"
    newest.rename(three / ".replaced-step_00000006")
    assert point(three).checkpoint == three / ".replaced-step_00000006"
    damage(three / ".replaced-step_00000006")
    assert point(three, "fallback").step == 4


def test_a_stage_that_has_ended_need_not_be_whole_any_more(tmp_path, capsys):
    ended = save(tmp_path / "a", 3)
    save(tmp_path / "b", 2, origin=checkpoint_digest(ended))
    directories = {"a": tmp_path / "a", "b": tmp_path / "b"}
    damage(ended)
    with pytest.raises(CheckpointError, match="stages.a: "):
        resume_points(directories, "auto")
    points = resume_points(directories, "fallback")
    assert points["a"].checkpoint == ended and points["a"].step == 3 and "checksum" in points["a"].damage
    assert points["b"].step == 2 and points["b"].damage is None
    assert "a: damaged, but the stage after it has begun" in capsys.readouterr().out
    save(tmp_path / "b", 2, origin="another")
    with pytest.raises(CheckpointError, match=r"stages\.a: no checkpoint .* is whole"):
        resume_points(directories, "fallback")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def test_processes_find_first_weights_together(ranks, three, tmp_path):
    """The folder may be one that another run still writes into."""
    save(tmp_path / "earlier", 2)
    newest = str(three / "step_00000006")
    assert ranks.run(2, find_where_one_sees_less, str(three), str(tmp_path / "earlier")) == [newest, newest]
    first, second = ranks.run(2, find_where_one_sees_less, str(tmp_path / "nowhere"), str(three))
    assert first == second and "no such checkpoint" in first


def test_processes_know_together_that_torchrun_started_them_again(ranks):
    assert ranks.run(2, restarted_on_one_node) == [True, True]


def test_processes_choose_together(ranks, three, tmp_path):
    damage(three / "step_00000006")
    first, second = ranks.run(2, choose, str(three), "fallback")
    assert first == second and first[:2] == (str(three / "step_00000004"), 4)
    refusals = ranks.run(2, choose, str(three), "auto")
    assert all("checksum" in refusal for refusal in refusals)


def test_a_process_that_does_not_see_what_the_main_one_sees(ranks, three):
    refusals = ranks.run(2, choose_where_one_sees_less, str(three), "auto")
    assert all("step_00000006" in refusal and "no such checkpoint" in refusal for refusal in refusals)
    nothing = ranks.run(2, choose_where_one_sees_less, str(three / "nowhere"), "auto")
    assert nothing == [("None", 0)] * 2


def train(overrides: list[str], output: Path, *more: str) -> int:
    return run_pipeline(compose_run([*overrides, f"output_dir={output}", "tracking.samples=true", *more]))


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory):
    """The output folder of an uninterrupted run of steps 3 and 6, saved at 2 and 3, 4 and 6."""
    output = tmp_path_factory.mktemp("whole")
    assert train(small_overrides(packed), output) == 0
    return output


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_run_falls_back_and_ends_as_if_nothing_had_happened(small, whole, copy, capsys):
    checkpoints = copy / "realtime" / "checkpoints"
    damage(latest(checkpoints))
    with pytest.raises(CheckpointError, match=r"stages\.realtime: .*step_00000006.*resume=fallback"):
        train(small, copy)
    capsys.readouterr()
    assert train(small, copy, "resume=fallback") == 0
    shown = capsys.readouterr().out
    assert "realtime: step_00000006 is passed over" in shown and "goes on from step_00000004" in shown
    assert '"event": "fallback"' in (copy / FILE_NAME).read_text()

    assert sorted(step_directories(checkpoints)) == [4, 6] and latest(checkpoints).name == "step_00000006"
    ours, theirs = load_checkpoint(latest(checkpoints)), load_checkpoint(latest(whole / "realtime" / "checkpoints"))
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
    for stage, count in (("align", 3), ("realtime", 6)):
        lines = (copy / stage / "samples.jsonl").read_bytes()
        assert lines == (whole / stage / "samples.jsonl").read_bytes()
        steps = read_samples(copy / stage / "samples.jsonl")
        assert [step.step for step in steps] == list(range(1, count + 1))
        assert all(len(step.keys) == 4 and step.keys[0][0] == stage for step in steps)
    assert train(small, copy) == 0  # and auto finds all of it whole


def test_a_damaged_predecessor_does_not_cost_the_stage_after_it(small, copy, capsys):
    damage(latest(copy / "align" / "checkpoints"))
    damage(latest(copy / "realtime" / "checkpoints"))
    with pytest.raises(CheckpointError, match=r"stages\.realtime"):
        train(small, copy)
    assert train(small, copy, "resume=fallback") == 0
    assert "align: damaged, but the stage after it has begun" in capsys.readouterr().out
    assert latest(copy / "realtime" / "checkpoints").name == "step_00000006"


def test_a_predecessor_that_is_still_needed_is_trained_to_its_end_again(small, whole, copy):
    damage(latest(copy / "align" / "checkpoints"))
    shutil.rmtree(copy / "realtime")
    with pytest.raises(CheckpointError, match=r"stages\.align"):
        train(small, copy)
    assert train(small, copy, "resume=fallback") == 0
    for stage in ("align", "realtime"):
        ours, theirs = (load_checkpoint(latest(output / stage / "checkpoints")) for output in (copy, whole))
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_never_demands_a_fresh_folder_and_others_are_no_values(small, copy):
    with pytest.raises(ConfigError, match="resume=never"):
        train(small, copy, "resume=never")
    with pytest.raises(ConfigError, match="resume='newest': legal values are auto, fallback, never"):
        train(small, copy, "resume=newest")


BEST = ["~stages.realtime", "stages.align.keep_best=eval/speak_f1", "stages.align.keep=1", "stages.align.steps=6"]


def test_the_best_is_kept_over_a_resume(small, tmp_path, monkeypatch):
    figures = iter([0.3, 0.8, float("nan")])
    monkeypatch.setattr("moss_train.train.evaluation.Evaluator.figures", lambda *_: {"speak_f1": next(figures)})
    evaluated = [*small, *BEST, "stages.align.eval_every=2", "stages.align.keep_every=2"]
    assert train(evaluated, tmp_path) == 0
    checkpoints = tmp_path / "align" / "checkpoints"
    assert sorted(step_directories(checkpoints)) == [2, 4, 6]
    assert (checkpoints / "best").read_text() == "step_00000004\n"
    assert find_checkpoint(checkpoints / "best") == checkpoints / "step_00000004"
    assert find_checkpoint(checkpoints / "latest") == latest(checkpoints)
    state = load_checkpoint(checkpoints / "step_00000004", only=()).state
    assert state["metrics"] == {"step": 4, "figures": {"eval/speak_f1": 0.8}}
    (checkpoints / "latest").write_text("step_00000004\n")
    figures = iter([0.5])
    assert train(evaluated, tmp_path, "stages.align.keep_every=null") == 0
    assert sorted(step_directories(checkpoints)) == [4, 6]


def test_any_figure_of_an_evaluation_may_tell_the_best(small):
    run = compose_run([*small, *BEST, "stages.align.eval_every=2"])
    for figure in figure_names():
        run.stages["align"].keep_best = f"eval/{figure}"
        run.validate()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "nothing is evaluated during the stage; set stages.align.eval_every"),
        (["stages.align.eval_every=4", "stages.align.save_every=5"], "no checkpoint is ever evaluated"),
        (["stages.align.eval_every=2", "stages.align.save_every=0"], "only the last step is saved"),
        (["stages.align.eval_every=2", "evaluate.source=null"], "set evaluate.source"),
        (["stages.align.eval_every=2", "stages.align.keep_best=eval/speak_f2"], "did you mean eval/speak_f1"),
        (["stages.align.eval_every=2", "stages.align.keep_best=eval/lm_ppl"], "did you mean eval/teacher_forced/lm_"),
        (
            ["evaluate.offline_source=null", "stages.align.eval_every=2", f"stages.align.keep_best=eval/{OFFLINE}"],
            "no conversation is answered; set evaluate.offline_source",
        ),
        (["stages.align.eval_every=2", "stages.align.keep_best_mode=most"], "legal values are max, min"),
        (["stages.align.keep_best=null", "stages.align.keep_every=3"], "must be a multiple of save_every=2"),
        (["stages.align.keep_best=null", "stages.align.keep_every=0"], "keep_every=0: must be at least 1, or null"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(small, overrides, expected):
    with pytest.raises(ConfigError) as error:
        compose_run([*small, *BEST, *overrides])
    assert expected in str(error.value) and "stages.align.keep" in str(error.value)
