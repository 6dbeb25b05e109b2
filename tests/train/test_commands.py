"""The options of `eval` and `stream`, and what they say of missing files."""

from dataclasses import fields, replace

import pytest

from moss_train.cli_options import field_documentation, parse_options
from moss_train.errors import CheckpointError, ConfigError
from moss_train.streams.config import CompilerConfig
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
        ("decode.speak_threshold=2", "speak_threshold"),
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
