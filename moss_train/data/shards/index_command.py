"""`data index`: the shards of a source, wherever they lie, get their index and the lengths of their streams."""

import os
import time
from dataclasses import dataclass, field

from moss_train.data.config import MODALITIES, DataConfig
from moss_train.data.corpus import Corpus
from moss_train.data.shards.index import SourceIndex
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.lengths import Lengths, lengths_of
from moss_train.data.shards.storage import ShardStore
from moss_train.errors import ConfigError
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.split import RowBudget
from moss_train.streams.tokenizer import load_tokenizer


@dataclass
class IndexOptions:
    """Options of `data index`."""

    path: str
    """Folder that holds `*.tar`; or the shards themselves, by path or URL, with counts and patterns:
    `https://host/shard-{000000..000123}.tar`, `s3://bucket/*.tar`, `pipe:<command>`."""
    out: str | None = None
    """Folder for `index.arrow`; null: beside the shards, which must be a local folder. A source is then named by it."""
    workers: int = 0
    """Processes that look at members and measure streams; one that crashes or hangs over a file is replaced. 0: one
    for each core."""
    lengths: bool = True
    """Measure how long every stream becomes under the tokenizer and compiler named here, so that training with them
    starts at once."""
    pack_text_tokens: int | None = None
    """With `pack_frames`: measure the parts of streams that are split by these budgets (`data.over_budget=split`);
    null measures whole streams."""
    pack_frames: int | None = None
    """See `pack_text_tokens`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Counts the tokens of texts."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """Settings under which the streams are measured: those of the stage that reads the source."""
    seed: int = 0
    """Of the run that reads the source: augmented variants (`compiler.augment.corruption`, `.interruption`) depend on
    it."""
    decode_timeout_s: float = 60.0
    """How long a process may take over one member; seconds."""
    decode_memory_mb: int = 8192
    """Most memory of a process, in MiB."""
    max_frame_pixels: int = 40_000_000
    """Larger pictures count as unreadable."""
    cache_dir: str | None = None
    """Folder where remote shards are kept; null: `moss_train/shards` in the user's cache folder."""
    cache_gb: float = 100.0
    """Size limit of that folder in GB (10⁹ bytes)."""
    remote_retries: int = 5
    """How often a failed transfer is tried again."""
    remote_timeout_s: float = 60.0
    """A transfer that brings no byte for so long has failed; seconds."""

    def validate(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")
        self.budget()
        for name in ("decode_timeout_s", "decode_memory_mb", "max_frame_pixels", "cache_gb", "remote_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        self.tokenizer.validate()
        self.compiler.validate()

    def data(self) -> DataConfig:
        """The settings of reading and fetching."""
        return DataConfig(
            decode_timeout_s=self.decode_timeout_s,
            decode_memory_mb=self.decode_memory_mb,
            max_frame_pixels=self.max_frame_pixels,
            cache_dir=self.cache_dir,
            cache_gb=self.cache_gb,
            remote_retries=self.remote_retries,
            remote_timeout_s=self.remote_timeout_s,
        )

    def budget(self) -> RowBudget | None:
        return RowBudget.of(self.pack_text_tokens, self.pack_frames)


def index_command(options: IndexOptions) -> int:
    """Read the shards of a source once and write their index; run again after an interruption it goes on.

    Example: moss-train data index path=https://host/data/shard-{000000..000123}.tar out=data/realtime workers=16
    """
    began = time.monotonic()
    data, tokenizer = options.data(), load_tokenizer(options.tokenizer)
    store, workers = ShardStore.of(data), options.workers or os.cpu_count() or 1
    try:
        index = build_index(options.path, options.out, workers, True, tokenizer, data, store)
        print(f"{index.path}: {_summary(index)}")
        if options.lengths:
            corpus = Corpus(options.path, index, tokenizer, options.compiler, None, data, store)
            print(_lengths_line(lengths_of(corpus, options.budget(), workers, True, options.seed)))
    finally:
        store.close()
    print(f"{time.monotonic() - began:.1f} s")
    return 0


def _summary(index: SourceIndex) -> str:
    totals = index.totals
    parts = [
        f"{len(index)} samples in {len(index.shards)} shards, {_size(totals.bytes)}",
        ", ".join(f"{totals.kinds[kind]} {kind}" for kind in sorted(totals.kinds)),
        ", ".join(f"{totals.modalities[name]} with {_MODALITY_NAMES[name]}" for name in totals.modalities),
        f"{totals.video_hours:.2f} h of video",
        f"{totals.text_tokens} tokens of text",
    ]
    if totals.unreadable_media:
        parts.append(f"{totals.unreadable_media} media cannot be read (`data check` names them)")
    return "\n  ".join(["", *filter(None, parts)]).lstrip()


_MODALITY_NAMES = dict(zip(MODALITIES, ("text alone", "stills", "video"), strict=True))


def _lengths_line(lengths: Lengths) -> str:
    units = len(lengths.samples)
    if not units:
        return f"no stream: all {len(lengths.faults)} samples are refused (`data check` says why)"
    line = (
        f"{units} streams of {lengths.tokens.mean():.0f} tokens (longest {lengths.tokens.max()}) "
        f"and {lengths.frames.mean():.0f} frames (most {lengths.frames.max()})"
    )
    return line + (f"; {len(lengths.faults)} samples do not compile" if lengths.faults else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
