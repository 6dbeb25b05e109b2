"""Tables on disk: Arrow IPC files with a JSON header, written whole or not at all, read through a memory map."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

_HEADER, _DIGEST = b"moss_train", b"moss_train_digest"
#: what reading a damaged file may raise
ARROW_ERRORS = (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError)


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], header: dict[str, Any]) -> None:
    """Write a table; `header` goes into its schema's metadata. The file appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = json.dumps(header).encode()
    try:
        with (
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema.with_metadata({_HEADER: text, _DIGEST: _sha256(text)})) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
        with temporary.open("rb") as raw:
            os.fsync(raw.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_arrow(path: Path, schema: pa.Schema, name: str) -> tuple[pa.RecordBatchFileReader, dict[str, Any]]:
    """A table of `write_arrow`, mapped, and its header, whose field `schema` must be `name`.

    Raises one of ARROW_ERRORS when it is none.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = reader.schema.metadata or {}
    text = metadata.get(_HEADER, b"")
    if _sha256(text) != metadata.get(_DIGEST):
        raise ValueError("it has no header, or one that was changed")
    header = json.loads(text)
    if header["schema"] != name:
        raise ValueError(f"its schema is {header['schema']!r}, not {name!r}")
    if not reader.schema.equals(schema):
        raise ValueError("its columns are those of another version")
    return reader, header


def _sha256(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
