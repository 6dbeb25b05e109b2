"""Weights of a Hugging Face folder, read where they lie: headers when it is opened, elements when they are copied."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moss_train.checkpoint.files import read_json
from moss_train.checkpoint.hugging_face.mapping import Part, normalise_reference_name, reference_tensors
from moss_train.engines.fit import require_fit
from moss_train.engines.pieces import Shape, slices_of
from moss_train.engines.weights import NAMESPACE
from moss_train.errors import CheckpointError
from moss_train.model.video_model import VideoModel

INDEX = "model.safetensors.index.json"

#: What a weight may be kept in; a quantised checkpoint is not one.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


class SafetensorsFiles:
    """Named tensors of one safetensors file, or of a folder of them; lazily."""

    def __init__(self, path: str | Path):
        """Reads the headers. With an index (`model.safetensors.index.json`) only the files it lists are read.

        Raises CheckpointError when a file is missing or damaged, does not hold what the index says, or the index names
        a file outside the folder.
        """
        self.path = Path(path)
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[Shape, str]] = {}
        self._opened: dict[Path, Any] = {}
        for file in weight_files(self.path):
            opened = self._open(file)
            for name in opened.keys():
                if name in self._file_of:
                    raise CheckpointError(
                        f"{self.path}: both {self._file_of[name].name} and {file.name} hold {name}; "
                        "keep the files of one model only"
                    )
                piece = opened.get_slice(name)
                self._file_of[name], self._headers[name] = file, (tuple(piece.get_shape()), piece.get_dtype())
        self._check_index()

    def shapes(self) -> dict[str, Shape]:
        """Name, as the files have it → shape."""
        return {name: shape for name, (shape, _) in self._headers.items()}

    def dtypes(self) -> dict[str, str]:
        """Name, as the files have it → safetensors' name of its dtype, such as BF16."""
        return {name: dtype for name, (_, dtype) in self._headers.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, backed by its file until it is copied."""
        file = self._file_of[name]
        try:
            return self._open(file).get_tensor(name)
        except Exception as error:
            raise CheckpointError(f"{file}: {name} cannot be read ({error}); fetch the file again") from error

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(file, framework="pt", device="cpu")
            except FileNotFoundError:
                raise CheckpointError(f"{file}: no such file") from None
            except Exception as error:  # safetensors raises its own error type for a damaged header
                raise CheckpointError(
                    f"{file}: not a readable safetensors file ({error}); fetch the file again"
                ) from error
        return self._opened[file]

    def _check_index(self) -> None:
        index = self.path / INDEX
        if not index.is_file():
            return
        listed = _weight_map(index)
        problems = [
            f"{file} lacks {name}"
            for name, file in listed.items()
            if name not in self._file_of or self._file_of[name].name != file
        ]
        if problems:
            raise CheckpointError(f"{index}: does not describe the files beside it:\n  " + "\n  ".join(problems))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files at `path`: itself, or in a folder those its index lists, or all when there is no index.

    CheckpointError when the index is damaged, names a file outside the folder, or one that is not there.
    """
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of the {len(names)} files it lists are missing; fetch them:\n  "
            + "\n  ".join(missing)
        )
    return [path / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names in it; fetch the file again")
    outside = sorted({file for file in listed.values() if not _SAFE_NAME.fullmatch(file)})
    if outside:
        raise CheckpointError(
            f"{index}: these are not names of safetensors files in this folder, so none of it is read:\n  "
            + "\n  ".join(map(repr, outside))
        )
    return listed


class HuggingFaceSource:
    """A `TensorSource` of `model/…` over the reference's files, checked against a model."""

    def __init__(self, files: SafetensorsFiles, model: VideoModel):
        """`model` is a whole one; on the meta device will do. Only headers are read.

        CheckpointError lists, all at once, every tensor that is missing, has no place in the model or another shape,
        or is not of floating point.
        """
        self.origin = str(files.path)
        self._files = files
        self._stored = _normalised(files)
        expected = reference_tensors(model)
        shapes = files.shapes()
        require_fit(
            {name: shapes[stored] for name, stored in self._stored.items()},
            {name: tensor.shape for name, tensor in expected.items()},
            self.origin,
        )
        _require_floats(files)
        self._parts: dict[str, tuple[str, Part]] = {
            f"{NAMESPACE}/{part.ours}": (name, part) for name, tensor in expected.items() for part in tensor.parts
        }

    def shapes(self) -> Mapping[str, Shape]:
        """`model/<parameter>` → shape of the whole parameter."""
        return {name: part.shape for name, (_, part) in self._parts.items()}

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        """A block in the precision of its file; a view of the file until it is copied."""
        reference, part = self._parts[name]
        if part.first_row:
            offsets = (part.first_row + offsets[0], *offsets[1:])
        return self._files.tensor(self._stored[reference])[slices_of(offsets, shape)]


def _normalised(files: SafetensorsFiles) -> dict[str, str]:
    """The reference's name → the name in the files."""
    stored: dict[str, str] = {}
    for name in files.shapes():
        normal = normalise_reference_name(name)
        if normal in stored:
            raise CheckpointError(
                f"{files.path}: {name} and {stored[normal]} are one tensor under two names; keep the files of one model"
            )
        stored[normal] = name
    return stored


def _require_floats(files: SafetensorsFiles) -> None:
    others = [f"{name} is {dtype}" for name, dtype in files.dtypes().items() if dtype not in FLOATS]
    if others:
        raise CheckpointError(
            f"{files.path}: weights must be of {', '.join(FLOATS)}; take the checkpoint that is not quantised:\n  "
            + "\n  ".join(others)
        )
