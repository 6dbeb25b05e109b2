"""Where first weights come from: one of our checkpoints, or a folder of the reference's (Hugging Face) safetensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moss_train.checkpoint.hugging_face.sizes import CONFIG, read_sizes, size_differences
from moss_train.checkpoint.hugging_face.source import HuggingFaceSource, SafetensorsFiles, weight_files
from moss_train.checkpoint.retention import BEST, best_checkpoint
from moss_train.checkpoint.store import (
    POINTER,
    CheckpointReader,
    checkpoint_digest,
    latest,
    open_together,
    step_directories,
)
from moss_train.engines.fit import require_fit
from moss_train.engines.pieces import Shape, TensorSource
from moss_train.engines.weights import NAMESPACE, named_weights
from moss_train.errors import CheckpointError, MossTrainError
from moss_train.model.decision_head import PREFIX
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.compose import CONFIG_FILE, load_run


@dataclass(frozen=True)
class Origin:
    """A place that holds weights."""

    path: Path
    hugging_face: bool  #: safetensors under the reference's names instead of one of our checkpoints

    @property
    def fingerprint(self) -> str:
        """Tells these weights from others: a checkpoint's digest, or names and sizes of Hugging Face's files."""
        if not self.hugging_face:
            return checkpoint_digest(self.path)
        listed = [[file.name, file.stat().st_size] for file in weight_files(self.path)]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def check(self, model: VideoModel, tokenizer: StreamTokenizer) -> None:
        """Raise CheckpointError unless the weights fit `model`, a whole one (on the meta device will do), and
        `tokenizer`.

        Names and shapes are compared, and what a published config.json says beyond them; no tensor is read.
        """
        source = self._stored(model)
        if not isinstance(source, CheckpointReader):
            self._check_config(model)
            return
        trained_with = source.provenance.get("tokenizer_fingerprint")
        if trained_with != tokenizer.fingerprint:
            raise CheckpointError(
                f"{self.path} was trained with another tokenizer (fingerprint {trained_with}, this run's is "
                f"{tokenizer.fingerprint}), so its embedding means other words: set the tokenizer it was trained with"
            )

    def _check_config(self, model: VideoModel) -> None:
        """Heads, rotary frequencies and the like do not show in shapes, and make other models of the same weights."""
        if not (self.path / CONFIG).is_file():
            return
        differences = size_differences(model.sizes, read_sizes(self.path))
        if differences:
            raise CheckpointError(
                f"{self.path} holds weights of other sizes than the run's; choose its recipe, or set these\n  "
                + "\n  ".join(differences)
            )

    def source(self, model: VideoModel) -> TensorSource:
        """The weights, named `model/<parameter>`, for `Engine.load_weights` and `load_weights_into`.

        `model` is a whole one; on the meta device will do. What is not asked for is not read. A decision head that the
        weights lack is added, fresh (`WithFreshHead`). CheckpointError when they do not fit `model` otherwise.
        Collective: processes verify a checkpoint together.
        """
        source = self._stored(model)
        fresh = missing_head(source.shapes(), expected_shapes(model))
        return WithFreshHead(source, fresh) if fresh else source

    def _stored(self, model: VideoModel) -> TensorSource:
        """What is in the files, which fits `model` but for a missing decision head."""
        if self.hugging_face:
            return HuggingFaceSource(SafetensorsFiles(self.path), model)
        reader = open_together(self.path)
        found = {name: shape for name, shape in reader.shapes().items() if name.startswith(f"{NAMESPACE}/")}
        expected = expected_shapes(model)
        require_fit(found | missing_head(found, expected), expected, reader.origin)
        return reader


class WithFreshHead:
    """A `TensorSource` to which a fresh decision head is added: zeros (`model.decision_head`)."""

    def __init__(self, source: TensorSource, fresh: Mapping[str, Shape]):
        """`fresh`: canonical name → shape of what is added."""
        self.origin, self.fresh = source.origin, dict(fresh)
        self._source = source

    def shapes(self) -> Mapping[str, Shape]:
        return {**self._source.shapes(), **self.fresh}

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        return torch.zeros(shape) if name in self.fresh else self._source.read(name, offsets, shape)


def missing_head(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the decision head that is expected and of which nothing was found; else nothing."""
    head = {name: shape for name, shape in expected.items() if name.startswith(f"{NAMESPACE}/{PREFIX}")}
    return {} if set(head) & set(found) else head


def expected_shapes(model: VideoModel) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of what a checkpoint must hold for `model`, a whole one."""
    return {name: tuple(tensor.shape) for name, tensor in named_weights(model).items()}


def find_origin(path: str | Path) -> Origin:
    """The weights at `path`: a checkpoint, see `find_checkpoint`, or a folder of Hugging Face safetensors.

    Raises CheckpointError when there are none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or folder")
    if (checkpoint := find_checkpoint(path)) is not None:
        return Origin(checkpoint, hugging_face=False)
    if (path.is_dir() or path.suffix == ".safetensors") and weight_files(path):
        return Origin(path, hugging_face=True)
    raise CheckpointError(
        f"{path}: neither a checkpoint, nor a folder of a stage or run that holds one, nor Hugging Face safetensors"
    )


def find_origin_together(path: str | Path) -> Origin:
    """`find_origin` as the main process sees it, for all: a folder that another run still writes into, or a file system
    that is slow to show what is there, must not give each process weights of its own. Collective."""
    told: list[str | bool] = []
    if groups.state().is_main:
        try:
            origin = find_origin(path)
            told = [str(origin.path), origin.hugging_face]
        except MossTrainError as error:
            told = [str(error)]
    found = gather_lists(told)[0]
    if len(found) == 1:
        raise CheckpointError(found[0])
    return Origin(Path(found[0]), hugging_face=found[1])


def find_checkpoint(path: Path) -> Path | None:
    """`path` if it is a checkpoint, what it names if it is a file `best` or `latest`, else the newest of a stage's
    folder or of a run's last trained stage; or None."""
    if (path / "manifest.json").is_file():
        return path
    if path.name == BEST and path.is_file():
        return best_checkpoint(path.parent)
    if path.name == POINTER and path.is_file():
        return latest(path.parent)
    if step_directories(path):
        return latest(path)
    if (path / "checkpoints").is_dir():
        return latest(path / "checkpoints")
    if not (path / CONFIG_FILE).is_file():
        return None
    stages = [name for name, _ in load_run(path).ordered_stages()]
    found = [latest(path / name / "checkpoints") for name in reversed(stages)]
    return next((checkpoint for checkpoint in found if checkpoint is not None), None)
