"""The command line as a user meets it: quick help, one-line errors, exit codes."""

import errno
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from moss_train.cli import COMMANDS, main
from moss_train.cli_options import all_paths, describe_options, field_documentation, parse_options
from moss_train.errors import ConfigError


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "moss_train", *arguments], capture_output=True, text=True, timeout=60)


def test_help_answers_at_once():
    run("--help")  # compiles the byte code
    best = min(_seconds("--help") for _ in range(3))
    assert best < 0.5


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - began


def test_help_names_every_verb():
    text = run("--help").stdout
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_has_help(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"moss-train {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train"),
        (["data"], "needs one of"),
        (["data", "pakc", "source=a"], "data pack"),
        (["doctor", "x=1"], "unknown key 'x'"),
        (["key=value"], "verb"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def test_no_error_repeats_a_password(capsys):
    for arguments in (
        ["stream", "ckpt=none", "rtsp://admin:geheim@host/live"],
        ["data", "index", "path=ftp-unknown://admin:geheim@host/a"],
        ["data", "synth", "source=activitynet", "captions=a", "media_root=b", "out=c", "writer=endpoint",
         "endpoint.api_key_env=null", "endpoint.model=m", "endpoint.base_url=ftp://me:geheim@host"],
    ):  # fmt: skip
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "geheim" not in told


def test_an_error_leaves_the_process_with_code_2_and_no_traceback():
    result = run("train", "recipe=realtime", "stages.realtime.optim.lrr=1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "stages.realtime.optim.lr" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_the_file_system_refuses_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    arguments = ["data", "render", f"out={tmp_path / 'file' / 'out'}", "workers=1"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "file" in shown and "directory" in shown

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moss_train.data.synthetic.render.write_still", full)
    arguments = ["data", "render", f"out={tmp_path / 'out'}", "workers=1", "align=1"]
    assert main([*arguments, "temporal=0", "sft=0", "realtime=0", "heldout=0"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@dataclass
class Inner:
    rate: float = 0.5
    """A rate."""
    name: str | None = None
    """A name."""


@dataclass
class Options:
    source: str
    """Folder to read."""
    count: int = 3
    """How many,
    over two lines."""
    inner: Inner = field(default_factory=Inner)
    table: dict[str, Inner] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count={self.count}: must be at least 1")


def test_options_are_typed_and_nested():
    options = parse_options(
        Options, ["source=a = b: c", "count=5", "inner.rate=1e-3", "inner.name=null", "flags=[x, y]", "table.k.rate=2"]
    )
    assert options == Options("a = b: c", 5, Inner(1e-3, None), {"k": Inner(2.0, None)}, ["x", "y"])
    assert isinstance(options.table["k"], Inner)


def test_null_is_text_where_a_field_may_not_be_null():
    assert parse_options(Options, ["source=null"]).source == "null"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "missing source=… (Folder to read.)"),
        (["source=a", "cuont=1"], "did you mean count"),
        (["source=a", "rate=1"], "did you mean inner.rate"),
        (["source=a", "count=many"], "count=many"),
        (["source=a", "count=1", "count=2"], "twice"),
        (["source=a", "count=0"], "at least 1"),
        (["source=a", "inner.rate.x=1"], "single value"),
        (["source=a", "flags=[x"], "flags=[x"),
        (["source"], "key=value"),
    ],
)
def test_bad_options(arguments, expected):
    with pytest.raises(ConfigError) as error:
        parse_options(Options, arguments)
    assert expected in " ".join(str(error.value).split())


def test_help_text_comes_from_the_fields():
    assert field_documentation(Options)["count"] == "How many, over two lines."
    text = describe_options(Options)
    assert "source=…" in text and "Required. Folder to read." in text and "inner.rate=0.5" in text
    assert "table.*.rate" in all_paths(Options)
