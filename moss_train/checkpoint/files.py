"""Files that survive a crash, and a manifest that notices any byte that did not.

A directory is complete when its `manifest.json` exists, lists every file with size and checksum, and all of them
agree. The manifest checks itself: it has one canonical form, which contains the digest of its own content.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from moss_train.errors import CheckpointError

FORMAT = "moss_train/checkpoint@1"
MANIFEST = "manifest.json"

#: Names of files inside a checkpoint: no separators, so nothing listed can lie outside the directory.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_HASH_THREADS = 4

#: Of a file, in the manifest: the 128-bit XXH3 (https://xxhash.com). It finds damage, as SHA-256 would, and takes a
#: tenth of its time, which on fast disks is most of a load; a manifest's own digest, which identifies a checkpoint, is
#: a SHA-256. Neither keeps out somebody who can write into the directory.
CHECKSUM = "xxh3_128"
new_checksum = xxhash.xxh3_128

#: What this process has verified: directory → its manifest's digest and the state of each file then. A checkpoint is
#: opened several times on the way from a plan to a model, and hashing it costs as much as reading it.
_verified: dict[Path, tuple[Any, ...]] = {}


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync one file. The directory entry is durable only after `sync_directory`."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the old content or the new, never a part. Its content is on disk then,
    the directory entry only after `sync_directory`."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_durably(temporary, content)
    os.replace(temporary, path)


def replace_durably(path: Path, content: bytes) -> None:
    """`replace`, durable when it returns."""
    replace(path, content)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file written by somebody else durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_bytes(content: Any, what: str) -> bytes:
    """UTF-8 JSON; CheckpointError naming `what` for anything JSON cannot hold (NaN, tensors, sets …)."""
    try:
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} cannot be written as JSON: {error}") from error


def read_json(path: Path) -> Any:
    """Parsed JSON of a file; CheckpointError names the file."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def write_manifest(directory: Path, step: int, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """List every file now in `directory`. Write it last: its presence says that the rest is whole.

    known: entries of files whose digest their writer computed; the rest is read for it.
    """
    listed = dict(known or {})
    for path in sorted(directory.iterdir()):
        if path.name not in listed:
            listed[path.name] = {"bytes": path.stat().st_size, CHECKSUM: _checksum(path)}
    write_durably(directory / MANIFEST, _manifest_bytes(step, dict(sorted(listed.items()))))


def verified_manifest(directory: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The manifest {"step": int, "files": {name: …}, "digest": str}, after comparing every file with it.

    Contents are read once in a process, unless the manifest, or a file's size or times, have changed since.
    share: (number, count) of the readers that divide the tensors' files among them; each compares all sizes, and the
    small files, which it is about to parse.
    CheckpointError names the first file that is missing, cut, changed, or not a plain file of this directory.
    """
    content = read_manifest(directory)
    try:
        listed = content["files"]
        seen = (content["digest"], *(_state(directory, name, entry["bytes"]) for name, entry in listed.items()))
        if _verified.get(directory.resolve()) != seen:
            _check_contents(directory, _share(listed, *share))
            _verified[directory.resolve()] = seen
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: damaged, or not of the format {FORMAT}: {error!r}") from error
    return content


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, compared with itself alone: what was saved, whether or not the files are still that."""
    manifest = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint")
    if not manifest.is_file():
        raise CheckpointError(f"{directory}: {MANIFEST} is missing, so the checkpoint was never finished or is damaged")
    content = read_json(manifest)
    try:
        if content["format"] != FORMAT or manifest.read_bytes() != _manifest_bytes(content["step"], content["files"]):
            raise ValueError("it is not what was written")
        if type(content["step"]) is not int:
            raise TypeError(f"step {content['step']!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{manifest}: damaged, or not of the format {FORMAT}: {error!r}") from error
    return content


def forget_verified(directory: Path) -> None:
    """Read the contents again at the next verification: another reader found its share of them damaged."""
    _verified.pop(directory.resolve(), None)


def _share(listed: Mapping[str, dict[str, Any]], number: int, count: int) -> dict[str, dict[str, Any]]:
    """The files whose content one of `count` readers compares."""
    tensors = [name for name in listed if name.endswith(".safetensors")]
    others = set(tensors) - set(tensors[number::count])
    return {name: entry for name, entry in listed.items() if name not in others}


def _check_contents(directory: Path, listed: Mapping[str, dict[str, Any]]) -> None:
    """Compare several files at a time: hashing one of them keeps one processor busy."""
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(_check_content, directory / name, entry[CHECKSUM]) for name, entry in listed.items()]
    for check in checks:
        check.result()


def _state(directory: Path, name: str, size: int) -> tuple[int, ...]:
    """What changes with a file's content; CheckpointError when the file cannot be the manifest's."""
    path = directory / name
    if not _SAFE_NAME.fullmatch(name):
        raise CheckpointError(f"{directory}/{MANIFEST}: {name!r} is not the name of a file in this directory")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing, or not a plain file")
    found = path.stat()
    if found.st_size != size:
        raise CheckpointError(f"{path}: {found.st_size} bytes, the manifest says {size}")
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _check_content(path: Path, checksum: str) -> None:
    if _checksum(path) != checksum:
        raise CheckpointError(f"{path}: the content has changed since it was written (its checksum differs)")


def _manifest_bytes(step: int, files: dict[str, Any]) -> bytes:
    body = {"format": FORMAT, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"digest": digest}, sort_keys=True, indent=1) + "\n").encode()


def _checksum(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, new_checksum).hexdigest()
