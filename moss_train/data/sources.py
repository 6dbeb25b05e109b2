"""The sources of a blend, opened: their indexes, the lengths of their streams, and the order made of them."""

import os
from dataclasses import asdict, dataclass

import numpy as np

from moss_train.data.blend import Blend, BlendSource
from moss_train.data.config import MODALITIES, DataConfig
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.shards.lengths import Lengths, lengths_of
from moss_train.data.shards.storage import ShardStore
from moss_train.errors import ConfigError, DataError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.split import RowBudget
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class SourceFigures:
    """What the blend takes from one source in its first epoch. A unit is a sample, or a part of one that was split."""

    samples: int  #: in the index
    kinds: dict[str, int]  #: samples by kind
    video_hours: float
    unreadable_media: int
    faulty: int  #: samples left out because they do not compile
    over_budget: int  #: units left out because they are longer than a row
    split: int  #: samples that were cut in parts
    units: int  #: usable ones
    modalities: dict[str, int]  #: usable units by modality
    mean_tokens: float  #: text tokens of a usable unit
    mean_frames: float
    weight: float
    max_epochs: float | None  #: passes over it after which later epochs do without it
    epoch_samples: int  #: units of the first epoch
    share: float  #: of its units
    token_share: float  #: of its text tokens, and
    frame_share: float  #: of its frames, as expected from the means
    passes: float  #: over the usable units in one epoch


@dataclass
class OpenBlend:
    """The sources of a blend, in its order, and the blend."""

    corpora: list[Corpus]
    lengths: list[Lengths]
    blend: Blend
    budget: RowBudget | None  #: by which streams are split; None: they are not
    varies: float = 0.0  #: the chance that an epoch shows a variant of a stream in its place

    def figures(self) -> dict[str, SourceFigures]:
        """Source → what an epoch takes from it."""
        epoch = [self.blend.source_size(number, 0) for number in range(len(self.corpora))]
        means = [_means(lengths, source) for lengths, source in zip(self.lengths, self.blend.sources, strict=True)]
        whole = np.array(
            [[count, count * tokens, count * frames] for count, (tokens, frames) in zip(epoch, means, strict=True)]
        )
        shares = whole / np.maximum(whole.sum(axis=0), 1e-12)
        figures = {}
        for number, (corpus, lengths, source) in enumerate(
            zip(self.corpora, self.lengths, self.blend.sources, strict=True)
        ):
            totals = corpus.index.totals
            figures[corpus.name] = SourceFigures(
                samples=len(corpus),
                kinds=dict(totals.kinds),
                video_hours=totals.video_hours,
                unreadable_media=totals.unreadable_media,
                faulty=len(lengths.faults),
                over_budget=len(lengths.samples) - len(source.units),
                split=len(np.unique(lengths.samples[lengths.parts > 0])),
                units=len(source.units),
                modalities={
                    modality: count
                    for modality, count in zip(
                        MODALITIES, np.bincount(source.modalities, minlength=len(MODALITIES)).tolist(), strict=True
                    )
                    if count
                },
                mean_tokens=means[number][0],
                mean_frames=means[number][1],
                weight=source.weight,
                max_epochs=source.max_epochs,
                epoch_samples=epoch[number],
                share=float(shares[number, 0]),
                token_share=float(shares[number, 1]),
                frame_share=float(shares[number, 2]),
                passes=epoch[number] / max(1, len(source.units)),
            )
        return figures


def open_blend(
    data: DataConfig,
    compiler: CompilerConfig,
    tokenizer: StreamTokenizer,
    image_size: int,
    seed: int,
    store: ShardStore | None = None,
    progress: bool = False,
) -> OpenBlend:
    """Open every source of `data`; lengths of streams that were never measured are measured now.

    `image_size` in pixels; `progress` shows a bar meanwhile. Raises ConfigError for illegal settings, DataError for
    sources that are missing, damaged, stale or empty.
    """
    data.validate()
    store = store or ShardStore.of(data)
    budget = RowBudget(data.pack_text_tokens, data.pack_frames) if data.over_budget == "split" else None
    corpora = [
        load_source(source.path, tokenizer, compiler, image_size, data, source.name or name, store)
        for name, source in data.sources.items()
    ]
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources has two sources of one name among {', '.join(names)}")
    lengths = [lengths_of(corpus, budget, os.cpu_count() or 1, progress, seed) for corpus in corpora]
    sources = [
        _blend_source(corpus, own, data, name) for corpus, own, name in zip(corpora, lengths, data.sources, strict=True)
    ]
    compiled_with = {f"compiler.{name}": value for name, value in asdict(compiler).items()}
    blend = Blend(sources, data, seed, {"tokenizer": tokenizer.fingerprint} | compiled_with)
    return OpenBlend(corpora, lengths, blend, budget, compiler.augment.varies)


def _blend_source(corpus: Corpus, lengths: Lengths, data: DataConfig, name: str) -> BlendSource:
    config, index = data.sources[name], corpus.index
    usable = np.flatnonzero((lengths.tokens <= data.pack_text_tokens) & (lengths.frames <= data.pack_frames))
    if len(lengths.samples) and not len(usable):
        raise DataError(
            f"all {len(lengths.samples)} samples of source {corpus.name!r} are longer than a row: they have at least "
            f"{lengths.tokens.min()} tokens (data.pack_text_tokens={data.pack_text_tokens}) and {lengths.frames.min()} "
            f"frames (data.pack_frames={data.pack_frames}): raise the budget that is too small"
            + ("" if data.over_budget == "split" else ", or set data.over_budget=split")
        )
    samples = lengths.samples[usable]
    return BlendSource(
        name=corpus.name,
        units=usable.astype(np.int32),
        shards=index.shard_numbers[samples],
        modalities=index.modalities[samples],
        identity={
            "index": index.fingerprint,
            "samples": len(index),
            "shards": len(index.shards),
            "lengths": lengths.digest,
        },
        weight=config.weight,
        max_samples=config.max_samples,
        max_epochs=config.max_epochs,
    )


def _means(lengths: Lengths, source: BlendSource) -> tuple[float, float]:
    """Mean text tokens and frames of the usable units; zeros when there is none."""
    if not len(source.units):
        return 0.0, 0.0
    return float(lengths.tokens[source.units].mean()), float(lengths.frames[source.units].mean())
