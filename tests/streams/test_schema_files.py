"""The JSON Schema files in the repository are those of the code."""

import json

import pytest

from moss_train.errors import ConfigError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.schema_files import DEFAULT_FOLDER, main, schema_texts


def test_files_are_up_to_date():
    stored = {path.name: path.read_text(encoding="utf-8") for path in DEFAULT_FOLDER.glob("*.schema.json")}
    assert stored == schema_texts(), "run python -m moss_train.streams.schema_files"


def test_the_command_writes_them(tmp_path):
    assert main([str(tmp_path / "new")]) == 0
    schema = json.loads((tmp_path / "new" / "stream.schema.json").read_text(encoding="utf-8"))
    assert schema["additionalProperties"] is False
    assert {"schema", "id", "media", "sampling", "events"} == set(schema["required"])
    assert "supersedes" in schema["$defs"]["Reply"]["properties"]


def test_defaults_of_the_compiler_are_legal():
    CompilerConfig().validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fps": 0}, "compiler.fps=0 must"),
        ({"min_frames": 0}, "compiler.min_frames=0 must"),
        ({"max_frames": 0}, "compiler.max_frames=0 must"),
        ({"tokens_per_second": 0.0}, "compiler.tokens_per_second=0.0 must"),
        ({"jitter_probability": 1.5}, "compiler.jitter_probability=1.5 must"),
        ({"window": 0}, "compiler.window=0 must"),
        ({"sinks": 2}, "compiler.sinks=2 has no effect without"),
    ],
)
def test_illegal_configurations(fields, message):
    with pytest.raises(ConfigError, match=message):
        CompilerConfig(**fields).validate()
