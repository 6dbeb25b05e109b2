"""Checkpoints on disk: one directory a step, complete or absent.

    step_00000100/
      tensors-00000.safetensors …   every tensor: weights, optimizer moments, random states
      index.json                    which slice of which tensor lies where (`tensor_files`)
      state.json                    step, loader position, engine metadata
      config.yaml, provenance.json  what made it
      manifest.json                 size and SHA-256 of each file above
    latest                          the name of the directory to go on from

A save writes into `.tmp-step_…`, syncs, renames, then moves the pointer. Killed at any instant, it leaves the
previous checkpoint and pointer as they were. A directory of checkpoints has one writer.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from moss_train.checkpoint import files
from moss_train.checkpoint.tensor_files import FILE_BYTES, INDEX, TensorIndex, write_tensors
from moss_train.engines.fit import require_fit
from moss_train.errors import CheckpointError

STATE = "state.json"
PROVENANCE = "provenance.json"
CONFIG = "config.yaml"
POINTER = "latest"

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


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    provenance: dict[str, Any],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write `directory/step_…` and point `latest` at it; a checkpoint of the same step is replaced.

    tensors: whole tensors by canonical name, on any device. state: JSON. provenance: JSON; its "config" becomes
    config.yaml. Returns when everything is on disk. CheckpointError when it cannot be written (disk full, no
    permission, not JSON): then earlier checkpoints and the pointer are as before.
    """
    directory = Path(directory)
    final = directory / f"step_{step:08d}"
    partial = directory / f"{_PARTIAL}{final.name}"
    state_bytes = files.json_bytes(state, STATE)
    described = {key: value for key, value in provenance.items() if key != "config"}
    provenance_bytes = files.json_bytes(described, PROVENANCE)
    try:
        config_bytes = yaml.safe_dump(provenance.get("config", {}), sort_keys=False, allow_unicode=True).encode()
    except yaml.YAMLError as error:
        raise CheckpointError(f"{CONFIG} cannot be written: {error}") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        partial.mkdir()
        write_tensors(partial, tensors, file_bytes)
        files.write_durably(partial / STATE, state_bytes)
        files.write_durably(partial / PROVENANCE, provenance_bytes)
        files.write_durably(partial / CONFIG, config_bytes)
        files.write_manifest(partial, step)
        files.sync_directory(partial)
        _publish(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error}); earlier checkpoints are intact. "
            "Free space or mend permissions, then resume"
        ) from error
    return final


def load_checkpoint(
    path: Path, expect: Mapping[str, Sequence[int]] | None = None, only: Sequence[str] | None = None
) -> Checkpoint:
    """Read a checkpoint after verifying every byte of it (once in a process).

    only: read just these namespaces (what stands before the first "/"), such as ("model",); None reads all.
    expect: name → shape. All names of the namespaces that occur in it must fit exactly, or CheckpointError lists
    every missing, unexpected and mis-shaped one. Other namespaces are not compared.
    """
    path = Path(path)
    manifest, index = _open(path)
    shapes = {name: shape for name, shape in index.shapes().items() if only is None or _namespace(name) in only}
    if expect is not None:
        compared = {_namespace(name) for name in expect}
        found = {name: shape for name, shape in shapes.items() if _namespace(name) in compared}
        require_fit(found, {name: tuple(shape) for name, shape in expect.items()}, str(path))
    return Checkpoint(
        path=path,
        step=manifest["step"],
        tensors=index.read(shapes),
        state=files.read_json(path / STATE),
        provenance=files.read_json(path / PROVENANCE) | {"config": _read_config(path / CONFIG)},
    )


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Canonical name → global shape of every tensor, verified, without reading a tensor."""
    return _open(Path(path))[1].shapes()


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless the checkpoint is complete and unchanged."""
    _open(Path(path))


def checkpoint_digest(path: Path) -> str:
    """What identifies a checkpoint: the SHA-256 of its manifest's content, verified."""
    return _open(Path(path))[0]["digest"]


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


def remove_checkpoint(path: Path) -> None:
    """Delete one step directory; killed half-way, it leaves nothing that looks like a checkpoint."""
    trash = path.with_name(f"{_TRASH}{path.name}")
    os.rename(path, trash)
    files.sync_directory(path.parent)
    shutil.rmtree(trash)


def _open(path: Path) -> tuple[dict[str, Any], TensorIndex]:
    if path.name.startswith(_PARTIAL):
        raise CheckpointError(f"{path}: a save that was not finished; it is never loaded")
    manifest = files.verified_manifest(path)
    missing = [name for name in (INDEX, STATE, PROVENANCE, CONFIG) if name not in manifest["files"]]
    if missing:
        raise CheckpointError(f"{path / files.MANIFEST}: does not list {', '.join(missing)}")
    return manifest, TensorIndex(path, manifest["files"])


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
        if path.name.startswith((_PARTIAL, _TRASH)) or (path.name.startswith(_REPLACED) and original.exists()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.name.startswith(_REPLACED):
            os.rename(path, original)


def _read_config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _namespace(name: str) -> str:
    return name.split("/", 1)[0]
