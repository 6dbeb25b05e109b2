"""Checkpoints on disk: one directory a step, complete or absent.

    step_00000100/
      tensors-00000-00000.safetensors …   every tensor: weights, optimizer moments, random states; each process that
                                          trained wrote files of its own (first number)
      index.json                    which slice of which tensor lies where (`tensor_files`)
      state.json                    step, loader position, engine metadata
      config.yaml, provenance.json  what made it
      manifest.json                 size and checksum of each file above
    latest                          the name of the directory to go on from

A save writes into `.tmp-step_…`, syncs, renames, then moves the pointer. Killed at any instant, it leaves the
previous checkpoint and pointer as they were. No two saves write into a folder of one name, so that a process which a
killed job has left on another host cannot spoil what its successor writes. A directory of checkpoints has one run that
writes to it; `saver` is how its processes do it together, `save_checkpoint` is for one process alone.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from moss_train.checkpoint import files
from moss_train.checkpoint.tensor_files import FILE_BYTES, INDEX, TensorIndex, merge_parts, write_part
from moss_train.engines.fit import require_fit
from moss_train.engines.pieces import Piece, Shape
from moss_train.errors import CheckpointError
from moss_train.parallel.agreement import gather_lists
from moss_train.parallel.groups import rank_and_ranks

STATE = "state.json"
PROVENANCE = "provenance.json"
CONFIG = "config.yaml"
POINTER = "latest"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL, _REPLACED, _TRASH = ".tmp-", ".replaced-", ".trash-"


@dataclass
class Checkpoint:
    """What `load_checkpoint` read."""

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]  #: by canonical name, on the CPU
    state: dict[str, Any]
    provenance: dict[str, Any]  #: with the resolved configuration under "config"


class CheckpointReader:
    """A verified checkpoint, of which any block of any tensor can be read (`engines.pieces.TensorSource`)."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        missing = [name for name in (INDEX, STATE, PROVENANCE, CONFIG) if name not in manifest["files"]]
        if missing:
            raise CheckpointError(f"{path / files.MANIFEST}: does not list {', '.join(missing)}")
        self.path = path
        self.origin = str(path)
        self.step: int = manifest["step"]
        self.digest: str = manifest["digest"]  #: SHA-256 of the manifest's content, which tells it from any other
        self.state: dict[str, Any] = _read_object(path / STATE)
        self.provenance: dict[str, Any] = _read_object(path / PROVENANCE)
        self.provenance["config"] = _read_config(path / CONFIG)
        self._index = TensorIndex(path, manifest["files"])

    def shapes(self) -> dict[str, Shape]:
        """Canonical name → global shape of every tensor; none is read for it."""
        return self._index.shapes()

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is kept."""
        return self._index.dtype(name)

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        """A block of a tensor on the CPU, backed by its file where it lies in one slice."""
        return self._index.read(name, offsets, shape)

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Whole tensors whose names start with `prefix`, as `read`."""
        return self._index.read_whole(name for name in self._index.shapes() if name.startswith(prefix))


def open_checkpoint(path: Path) -> CheckpointReader:
    """A checkpoint after verifying every byte of it (once in a process). CheckpointError names what is damaged."""
    path = Path(path)
    _refuse_partial(path)
    return CheckpointReader(path, files.verified_manifest(path))


def open_together(path: Path) -> CheckpointReader:
    """`open_checkpoint` by all processes at once, which divide the reading of its bytes. Collective.

    What one of them finds wrong raises CheckpointError on all.
    """
    path = Path(path)
    reader, fault = None, None
    try:
        _refuse_partial(path)
        reader = CheckpointReader(path, files.verified_manifest(path, rank_and_ranks()))
    except (CheckpointError, OSError) as error:
        fault = str(error)
    faults = [told[0] for told in gather_lists([fault] if fault is not None else []) if told]
    if faults:
        files.forget_verified(path)
        raise CheckpointError(fault or faults[0])
    assert reader is not None
    return reader


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    provenance: dict[str, Any],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write `directory/step_…` and point `latest` at it; a checkpoint of the same step is replaced. For one process.

    tensors: whole tensors by canonical name, on any device; backed by files, they are not read before they are written.
    state: JSON. provenance: JSON; its "config" becomes config.yaml. Returns when everything is on disk.
    CheckpointError when it cannot be written (disk full, no permission, not JSON): then earlier checkpoints and the
    pointer are as before.
    """
    directory = Path(directory)
    texts = text_files(state, provenance)
    pieces = [
        Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach()) for name, tensor in tensors.items()
    ]
    partial = None
    try:
        partial = begin_directory(directory, step)
        return publish(partial, step, [write_part(partial, 0, pieces, file_bytes)], texts)
    except (OSError, CheckpointError) as error:
        if partial is not None:
            discard_partial(partial)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(cannot_write(directory / step_name(step), error)) from error


def text_files(state: dict[str, Any], provenance: dict[str, Any]) -> dict[str, bytes]:
    """state.json, provenance.json and config.yaml; CheckpointError for what they cannot hold."""
    described = {key: value for key, value in provenance.items() if key != "config"}
    try:
        config = yaml.safe_dump(provenance.get("config", {}), sort_keys=False, allow_unicode=True).encode()
    except yaml.YAMLError as error:
        raise CheckpointError(f"{CONFIG} cannot be written: {error}") from error
    return {
        STATE: files.json_bytes(state, STATE),
        PROVENANCE: files.json_bytes(described, PROVENANCE),
        CONFIG: config,
    }


def begin_directory(directory: Path, step: int) -> Path:
    """A new folder for a save's files, after clearing what killed saves left. OSError when there can be none."""
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    partial = _unused(directory, f"{_PARTIAL}{step_name(step)}")
    partial.mkdir()
    return partial


def publish(partial: Path, step: int, parts: Sequence[dict[str, Any]], texts: Mapping[str, bytes]) -> Path:
    """Complete a save whose tensors are written: index, texts, manifest; then rename it and move the pointer.

    partial: what `begin_directory` gave. parts: what `write_part` gave, of every writer. OSError or CheckpointError
    when it cannot be.
    """
    final = partial.parent / step_name(step)
    index, known = merge_parts(parts)
    files.write_durably(partial / INDEX, files.json_bytes(index, INDEX))
    for name, content in texts.items():
        files.write_durably(partial / name, content)
    files.write_manifest(partial, step, known)
    files.sync_directory(partial)
    _publish(partial, final)
    return final


def discard_partial(partial: Path) -> None:
    """Remove what a failed save wrote."""
    shutil.rmtree(partial, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> str:
    """The message of a failed save."""
    remedy = "Free space" if error.errno in _NO_ROOM else "Mend that"
    return f"{path}: cannot be written ({error}); earlier checkpoints are intact. {remedy}, then give the same command"


def load_checkpoint(
    path: Path, expect: Mapping[str, Sequence[int]] | None = None, only: Sequence[str] | None = None
) -> Checkpoint:
    """Whole tensors of a checkpoint after verifying every byte of it (once in a process).

    only: read just these namespaces (what stands before the first "/"), such as ("model",); None reads all.
    expect: name → shape. All names of the namespaces that occur in it must fit exactly, or CheckpointError lists
    every missing, unexpected and mis-shaped one. Other namespaces are not compared.
    """
    reader = open_checkpoint(path)
    shapes = {name: shape for name, shape in reader.shapes().items() if only is None or _namespace(name) in only}
    if expect is not None:
        compared = {_namespace(name) for name in expect}
        found = {name: shape for name, shape in shapes.items() if _namespace(name) in compared}
        require_fit(found, {name: tuple(shape) for name, shape in expect.items()}, str(path))
    tensors = {name: reader.read(name, (0,) * len(shape), shape) for name, shape in shapes.items()}
    return Checkpoint(reader.path, reader.step, tensors, reader.state, reader.provenance)


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Canonical name → global shape of every tensor, verified, without reading a tensor."""
    return open_checkpoint(path).shapes()


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless the checkpoint is complete and unchanged."""
    open_checkpoint(path)


def checkpoint_digest(path: Path) -> str:
    """What identifies a checkpoint: the SHA-256 of its manifest's content, verified."""
    return open_checkpoint(path).digest


def latest(directory: Path) -> Path | None:
    """The checkpoint to go on from, or None when there is none. Its content is not verified here.

    CheckpointError when the pointer is damaged or points nowhere: which checkpoint to take is then yours to say.
    """
    directory = Path(directory)
    pointer = directory / POINTER
    if not pointer.is_file():
        # The first save may have been killed between its rename and its pointer.
        found = step_directories(directory)
        return found[max(found)] if found else None
    name = pointer.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer}: damaged; write the name of a step directory into it, or delete it")
    # A save that replaces a step was killed between its two renames when only the second exists.
    for candidate in (directory / name, directory / f"{_REPLACED}{name}"):
        if candidate.is_dir():
            return candidate
    raise CheckpointError(
        f"{pointer}: {name} does not exist; write the name of a step directory into it, or delete it "
        "to go on from the newest one"
    )


def step_directories(directory: Path) -> dict[int, Path]:
    """Step → directory of every finished checkpoint in `directory`; none when it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return {}
    matches = ((_STEP.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint that `latest` gave."""
    match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
    if match is None:
        raise ValueError(f"{path}: not the directory of a step")
    return int(match[1])


def remove_checkpoint(path: Path) -> None:
    """Delete one step directory; killed half-way, it leaves nothing that looks like a checkpoint.

    What cannot be deleted at once, such as a file on NFS that somebody reads, the next save tries again.
    """
    trash = _unused(path.parent, f"{_TRASH}{path.name}")
    os.rename(path, trash)
    files.sync_directory(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def _unused(directory: Path, prefix: str) -> Path:
    """A path that no other process, nor an earlier one, has."""
    return directory / f"{prefix}-{uuid.uuid4().hex[:12]}"


def _refuse_partial(path: Path) -> None:
    if path.name.startswith(_PARTIAL):
        raise CheckpointError(f"{path}: a save that was not finished; it is never loaded")


def _publish(partial: Path, final: Path) -> None:
    directory = final.parent
    replaced = directory / f"{_REPLACED}{final.name}"
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    files.sync_directory(directory)
    files.replace_durably(directory / POINTER, f"{final.name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(directory: Path) -> None:
    """Clear what a killed save or removal left; a replaced checkpoint only once its successor stands."""
    for path in directory.iterdir():
        original = directory / path.name.removeprefix(_REPLACED)
        if path.name.startswith((_PARTIAL, _TRASH)):
            # No name of these is used again, so that what cannot be removed yet is in nobody's way.
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        elif path.name.startswith(_REPLACED) and original.exists():
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            os.rename(path, original)


def _read_object(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: should hold a JSON object")
    return content


def _read_config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _namespace(name: str) -> str:
    return name.split("/", 1)[0]
