"""`moss-train convert export`: a checkpoint becomes a folder that transformers, or the reference's code, loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moss_train.checkpoint.files import json_bytes, read_json
from moss_train.checkpoint.hugging_face.folder import (
    generation_config,
    parse_bytes,
    preprocessor_config,
    require_empty,
    write_folder,
)
from moss_train.checkpoint.hugging_face.sizes import (
    CONFIG,
    EXTRA_ROWS,
    VIDEO_CLASS,
    config_json,
    is_plain,
    read_sizes,
    size_differences,
)
from moss_train.checkpoint.hugging_face.source import INDEX
from moss_train.checkpoint.hugging_face.tokenizer_files import tokenizer_files
from moss_train.engines.weights import NAMESPACE
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.build import whole_model
from moss_train.model.precision import Precision
from moss_train.parallel import groups
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.config import RunConfig
from moss_train.train.import_command import STAGE
from moss_train.train.restore import open_trained
from moss_train.train.weights import Origin

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = "stored"
_TAKEN_OVER = (".json", ".jinja", ".py", ".txt")  #: kinds of small files that `like` gives


@dataclass
class ExportOptions:
    """Options of `convert export`."""

    ckpt: str
    """Checkpoint folder, or a stage's or run's folder, whose newest checkpoint is taken."""
    out: str
    """Folder to write; must not exist, or be empty."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16, float16, or `stored` (as the checkpoint keeps them, trained weights in
    float32). Null takes the precision the run trained in, and `stored` for what `convert import` wrote."""
    shard_bytes: str = "5GB"
    """Largest size of a file of weights; a single tensor may be larger."""
    like: str | None = None
    """Folder of a published model of the same sizes, whose config, processor and code files are taken over as they are
    (code is copied, not run); null writes them anew."""

    def validate(self) -> None:
        if self.dtype not in (None, _STORED, *_DTYPES):
            raise ConfigError(f"dtype={self.dtype!r}: legal values are {', '.join(_DTYPES)}, {_STORED}, or null")
        parse_bytes(self.shard_bytes, "shard_bytes")


def export_command(options: ExportOptions) -> int:
    """Write a checkpoint's weights under Hugging Face's names, with config, processor and tokenizer beside them.

    Without video additions (model.pool=none, cross_rope=false, vision.full_attention=false) transformers'
    MllamaForConditionalGeneration loads it; with them it has MOSS-Video-Preview's form, for the reference's code.
    Weights are streamed, so the model need not fit into memory.

    Example: moss-train convert export ckpt=outputs/realtime out=exported
    """
    out = Path(options.out)
    require_empty(out)
    reader, tokenizer, run = open_trained(options.ckpt)
    if run.model.text.extra_embedding_rows != EXTRA_ROWS:
        raise CheckpointError(
            f"{reader.path}: model.text.extra_embedding_rows={run.model.text.extra_embedding_rows}, but models of this "
            f"form have {EXTRA_ROWS}: it cannot be exported"
        )
    dtype = _dtype(options.dtype, reader.state.get("stage") == STAGE, run)
    try:
        with torch.device("meta"):
            model = whole_model(run.model, groups.initialize())
        Origin(reader.path, hugging_face=False).source(model)  # checks that every weight is there
        named = dtype or reader.dtype(f"{NAMESPACE}/head.weight")
        texts = _texts(run, tokenizer, named) | _taken_over(options.like, run, named)
        with _bar() as bar:
            written = write_folder(
                out, reader, model, texts, dtype, parse_bytes(options.shard_bytes, "shard_bytes"), bar
            )
    finally:
        groups.shutdown()
    what = "as stored" if dtype is None else f"in {str(dtype).removeprefix('torch.')}"
    print(
        f"wrote {out}: {written.parameters:,} parameters in {written.tensors} tensors, {what}, {written.bytes:,} bytes "
        f"in {written.files} file{'s' if written.files > 1 else ''}, from {reader.path}"
    )
    if run.model.decision_head:
        print("its decision head is left out: models of this form have none")
    if is_plain(run.model):
        print(
            f"load it: transformers.MllamaForConditionalGeneration.from_pretrained({str(out)!r})\n"
            "some versions of transformers read the intermediate maps one layer later: see docs/hugging_face.md"
        )
    else:
        print(
            f"its class is {VIDEO_CLASS}, MOSS-Video-Preview's own: transformers' Mllama has the same "
            "weights, but would leave out the video additions"
        )
    return 0


def _dtype(wanted: str | None, imported: bool, run: RunConfig) -> torch.dtype | None:
    if wanted == _STORED or (wanted is None and imported):
        return None
    return _DTYPES[wanted] if wanted is not None else Precision.named(run.precision).dtype


def _texts(run: RunConfig, tokenizer: StreamTokenizer, dtype: torch.dtype) -> dict[str, bytes]:
    """The small files of the folder."""
    plain, path = is_plain(run.model), run.tokenizer.path
    contents: dict[str, Any] = {
        CONFIG: config_json(run.model, tokenizer.special, dtype),
        "generation_config.json": generation_config(tokenizer.special),
        # Video frames are one tile each.
        "preprocessor_config.json": preprocessor_config(run.model, run.model.vision.max_tiles if plain else 1),
    }
    folder = None if path is None else Path(path) if Path(path).is_dir() else Path(path).parent
    named = {name: json_bytes(content, name) for name, content in contents.items()}
    return named | tokenizer_files(tokenizer, folder, rename=not plain)


def _taken_over(like: str | None, run: RunConfig, dtype: torch.dtype) -> dict[str, bytes]:
    """The small files of a published folder but its tokenizer, whose ids the run may have given other roles."""
    if like is None:
        return {}
    folder = Path(like)
    sizes = read_sizes(folder)
    differences = size_differences(run.model, sizes)
    if is_plain(run.model) != is_plain(sizes):
        differences.append("one of them has video additions (pooling, rotated cross-attention, full attention)")
    if differences:
        raise ConfigError(f"like={like}: not a model of the same sizes\n  " + "\n  ".join(differences))
    found = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in _TAKEN_OVER
        and file.name != INDEX
        and not file.name.startswith(("tokenizer", "special_tokens", "chat_template"))
    }
    config = read_json(folder / CONFIG)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return found | {CONFIG: json_bytes(config, CONFIG)}


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar that takes (bytes done, bytes in all)."""
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
