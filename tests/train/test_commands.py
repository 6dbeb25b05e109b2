"""The options of `eval` and `stream`, and what they say of missing files."""

from contextlib import suppress
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from moss_train.cli_options import field_documentation, parse_options
from moss_train.errors import CheckpointError, ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.streams.config import CompilerConfig
from moss_train.train import evaluate_command as evaluating
from moss_train.train import stream_command as streaming
from moss_train.train.config import RunConfig, StageConfig
from moss_train.train.evaluate_command import EvaluateOptions, evaluate_command
from moss_train.train.stream_command import StreamOptions, served_compiler, stream_command, system_of


def test_questions_on_the_way():
    options = parse_options(
        StreamOptions,
        ["ckpt=c", "video=v", "questions=4.5:What colour is it; really?;9 : Where?", "question=Who: me?", "ask_at_s=6"],
    )
    assert options.asked() == [(4.5, "What colour is it; really?"), (6.0, "Who: me?"), (9.0, "Where?")]
    assert parse_options(StreamOptions, ["ckpt=c", "video=v"]).asked() == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("questions=What?", "write times and questions"),
        ("speed=-1", "speed=-1"),
        ("fps=0", "fps=0"),
        ("max_seconds=0", "max_seconds"),
        ("save=out.avi", "save=out.avi"),
        ("decode.speak_threshold=2", "decode.speak_threshold=2"),
        ("decode.think_tokens=many", "decode.think_tokens=many"),
        ("decode.speak_treshold=0.2", "did you mean decode.speak_threshold"),
        ("generation.top_p=0", "top_p"),
    ],
)
def test_illegal_options(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(StreamOptions, ["ckpt=c", "video=v", argument])


def test_windows_are_those_of_training_unless_the_options_say_otherwise():
    trained = CompilerConfig(window=8, sinks=2, text_window=100, text_sinks=10)

    def served(*arguments):
        return served_compiler(parse_options(StreamOptions, ["ckpt=c", "video=v", *arguments]), trained)

    assert served() == trained
    assert served("window=4") == replace(trained, window=4)
    assert served("window=0") == replace(trained, window=None, sinks=0)
    assert served("window=0", "text_window=0") == replace(trained, window=None, sinks=0, text_window=None, text_sinks=0)
    assert served("sinks=0", "text_sinks=3") == replace(trained, sinks=0, text_sinks=3)
    with pytest.raises(ConfigError, match="compiler.sinks=1 has no effect"):
        served("window=0", "sinks=1")
    with pytest.raises(ConfigError, match="a camera or a URL is played in time"):
        parse_options(StreamOptions, ["ckpt=c", "video=rtsp://host/a", "speed=0"])


class _Handed(Exception):
    """Stands in for what would be done with the settings."""


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Calls a verb with arguments on a run with `evaluate.decode` of its own; gives the settings it decodes with."""

    def call(verb: str, trained: DecodeConfig, *arguments: str) -> DecodeConfig:
        run = RunConfig(stages={"realtime": StageConfig()})
        run.evaluate.decode, run.evaluate.settings.window_frames = trained, 5
        handed = []

        def hand_over(*positional, **_):
            handed.extend(value for value in positional if isinstance(value, DecodeConfig))
            raise _Handed

        for module in (evaluating, streaming):
            monkeypatch.setattr(module, "load_model", lambda path: (None, None, run))
            monkeypatch.setattr(module, "stage_of", lambda path: "realtime")
        for name in ("load_source", "FrameCache", "prepare_streams"):
            monkeypatch.setattr(evaluating, name, lambda *_: None)
        monkeypatch.setattr(evaluating, "run_streams", hand_over)
        clip = SimpleNamespace(name="clip", duration_s=1.0, frames_at=lambda times_s: None)
        monkeypatch.setattr(streaming, "read_clip", lambda *_: clip)
        monkeypatch.setattr(streaming, "live_schedule", lambda *_: (None, []))
        monkeypatch.setattr(streaming, "play", hand_over)
        with suppress(_Handed):
            if verb == "eval":
                evaluate_command(parse_options(EvaluateOptions, ["ckpt=c", "data=d", *arguments]))
            else:
                stream_command(parse_options(StreamOptions, ["ckpt=c", f"video={tmp_path}", "speed=0", *arguments]))
        (found,) = handed
        return found

    return call


@pytest.mark.parametrize("verb", ["eval", "stream"])
def test_replies_are_read_as_the_run_reads_them_unless_the_options_say_otherwise(verb, decoded, capsys):
    trained = DecodeConfig(speak_threshold=0.3, think_tokens=8)
    assert decoded(verb, trained) == trained
    assert "speak_threshold=0.3" in capsys.readouterr().out
    assert decoded(verb, trained, "decode.speak_threshold=0.6") == replace(trained, speak_threshold=0.6)
    assert "given: decode.speak_threshold" in capsys.readouterr().out
    # Null is a setting, not the absence of one.
    assert decoded(verb, trained, "decode.speak_threshold=null") == replace(trained, speak_threshold=None)
    assert decoded(verb, trained, "decode.last_slot_tokens=3") == replace(trained, last_slot_tokens=3)
    # The threshold that the other way reads does not stand in its way.
    by_head = DecodeConfig(decide_by="head", head_threshold=0.2)
    assert decoded(verb, trained, "decode.decide_by=head") == DecodeConfig(decide_by="head", think_tokens=8)
    assert decoded(verb, by_head, "decode.head_threshold=0.4") == replace(by_head, head_threshold=0.4)
    with pytest.raises(ConfigError, match=r"decode.speak_threshold=0\.4: it is for decode.decide_by=tokens"):
        decoded(verb, by_head, "decode.speak_threshold=0.4")


def test_figures_are_taken_with_the_runs_tolerances(decoded, capsys):
    decoded("eval", DecodeConfig(), "settings.limit=3")
    shown = capsys.readouterr().out
    assert "window_frames=5" in shown and "limit=3" in shown and "given: settings.limit" in shown


def test_missing_files_are_clear_errors(tmp_path):
    video = tmp_path / "clip.mp4"
    options = StreamOptions(ckpt=str(tmp_path / "none"), video=str(video))
    with pytest.raises(ConfigError, match="no such file"):
        stream_command(options)
    video.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        stream_command(options)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate_command(EvaluateOptions(ckpt=str(tmp_path / "none")))
    assert system_of(None) is None
    assert system_of(str(tmp_path)) is None


def test_every_option_is_documented():
    for options in (StreamOptions, EvaluateOptions):
        assert set(field_documentation(options)) == {field.name for field in fields(options)}
