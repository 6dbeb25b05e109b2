"""What a recipe says about data: the sources of its blend, the batch, packing, decoding and the budgets."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from moss_train.errors import ConfigError

DECODERS = ("auto", "decord", "pyav")


@dataclass
class SourceConfig:
    """One packed folder of shards (`data pack` writes it) and its share of the blend."""

    name: str = ""
    """Name in logs and ledgers; empty: the source's key in `data.sources`."""
    path: str = MISSING
    """Folder that holds `*.tar` and `index.jsonl`."""
    weight: float = 1.0
    """How often the source is read per epoch: 1.0 each sample once, 2.0 twice, 0.25 a new quarter every epoch."""


@dataclass
class DataConfig:
    """Where the streams come from and how they are put together into global batches."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The blend: name → source."""
    global_batch_size: int = 32
    """Streams per optimizer step, over all data ranks; the quickstart's size."""
    micro_batch_rows: int = 8
    """Most rows of one forward pass on one rank; bounds activation memory."""
    pack: bool = True
    """Lay several streams end to end in one row; False gives every stream a row of its own."""
    pack_text_tokens: int = 2048
    """Text-token budget of a row; a longer stream is over budget and left out, counted."""
    pack_frames: int = 256
    """Frame budget of a row (the reference's longest video); streams with more frames are over budget."""
    workers: int = 1
    """Decoder processes of this rank; 0 decodes in the training process, where no deadline can be enforced."""
    prefetch: int = 2
    """Steps whose frames are decoded ahead of the one being trained."""
    frame_cache_mb: int = 512
    """Bound of the cache of decoded uint8 frames, in MiB; 0 turns it off."""
    compiled_cache_mb: int = 256
    """Bound of the cache of compiled streams, in MiB, so that later epochs read no JSON."""
    decoder: str = "auto"
    """`auto` (decord, with PyAV where decord is known to be wrong or fails), `decord` or `pyav`."""
    decode_timeout_s: float = 60.0
    """A decoder process that takes longer over one clip is killed and the sample is quarantined; seconds."""
    max_frame_pixels: int = 40_000_000
    """Largest picture that is decoded (8K video is 33 megapixels); bounds memory on hostile input."""
    max_bad_fraction: float = 0.01
    """Share of the blend's samples, rounded up, that may be quarantined before the run stops; 0 allows none."""
    shuffle: bool = True
    """False keeps the order of the index (evaluation, debugging)."""
    shuffle_window_shards: int = 4
    """Samples mix inside windows of this many shards of a source, so that reads stay local."""

    def validate(self) -> None:
        """Raise ConfigError for the first illegal field."""
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one packed folder, data.sources.<name>.path=…")
        for name, source in self.sources.items():
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise ConfigError(f"data.sources.{name}.weight={source.weight} must be above 0: leave the source out")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"data.{name}={value} must be at least {least}")
        if self.decoder not in DECODERS:
            raise ConfigError(f"data.decoder={self.decoder!r} is not one of {', '.join(DECODERS)}")
        if not self.decode_timeout_s > 0:
            raise ConfigError(f"data.decode_timeout_s={self.decode_timeout_s} must be above 0 seconds")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction} must lie in 0 … 1")


_LEAST = {
    "global_batch_size": 1,
    "micro_batch_rows": 1,
    "pack_text_tokens": 1,
    "pack_frames": 1,
    "workers": 0,
    "prefetch": 0,
    "frame_cache_mb": 0,
    "compiled_cache_mb": 0,
    "max_frame_pixels": 1,
    "shuffle_window_shards": 1,
}
