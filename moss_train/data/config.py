"""What a recipe says about data: the sources of its blend, the batch, packing, decoding and the budgets."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from moss_train.errors import ConfigError

DECODERS = ("auto", "decord", "pyav", "torchcodec")
OVER_BUDGET = ("skip", "split")
MODALITIES = ("text", "image", "video")


@dataclass
class SourceConfig:
    """One packed source of shards (`data pack` or `data index` wrote its index) and its share of the blend."""

    name: str = ""
    """Name in logs and ledgers; empty: the source's key in `data.sources`."""
    path: str = MISSING
    """Folder, or URL of a folder (http, https, s3, …), that holds `index.arrow` and the shards it names."""
    weight: float = 1.0
    """How often the source is read per epoch: 1.0 each sample once, 2.0 twice, 0.25 a new quarter every epoch."""
    max_samples: int | None = None
    """Most samples of this source in one epoch, drawn anew every epoch; null: no cap."""
    max_epochs: float | None = None
    """Most passes over the source in the whole stage: once they are used up, later epochs do without it; null: no
    cap."""


@dataclass
class CostConfig:
    """Cost of a stream of t tokens and f frames, in units of one token's: token·t + token_squared·t² + token_frame·t·f
    + frame·f. Rows are dealt to ranks by it.

    The defaults are counts of floating-point operations of the 11B model (2 per weight and token, 4·width per attended
    pair and layer): a frame costs the tower's 0.86e9 weights times 1,601 patches; a causal token pair 32 self layers of
    width 4096; a token-frame pair 101 keys in 8 cross layers. `moss-train bench cost` measures them for another model
    or machine.
    """

    token: float = 1.0
    """Of a token alone."""
    token_squared: float = 1.3e-5
    """Of a pair of tokens of one stream."""
    token_frame: float = 6.6e-4
    """Of a token and a frame that it may see."""
    frame: float = 140.0
    """Of a frame alone: tower, projector, keys and values."""


@dataclass
class DataConfig:
    """Where the streams come from and how they are put together into global batches."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The blend: name → source."""
    temperature: float = 1.0
    """Evens out unequal sources: shares of an epoch are proportional to (weight × samples)^(1/temperature). 1 leaves
    them proportional, large values make them equal; the length of the epoch stays."""
    shares: dict[str, float] = field(default_factory=dict)
    """Share of the epoch's samples by modality, `text` (no media), `image` (stills only) and `video`, whatever source
    they come from; empty: as they come. Each source's samples of a modality are read in part or repeatedly to fit."""
    global_batch_size: int = 32
    """Streams per optimizer step, over all data ranks; the quickstart's size."""
    micro_batch_rows: int = 8
    """Most rows of one forward pass on one rank; bounds activation memory."""
    pack: bool = True
    """Lay several streams end to end in one row; False gives every stream a row of its own."""
    pack_text_tokens: int = 2048
    """Text-token budget of a row."""
    pack_frames: int = 256
    """Frame budget of a row (the reference's longest video)."""
    over_budget: str = "skip"
    """What becomes of a sample that is longer than a row: `skip` leaves it out of the order; `split` cuts streams
    between two slots into parts that fit and leaves other samples out. Both are counted before training."""
    cost: CostConfig = field(default_factory=CostConfig)
    """What a stream costs: rows are dealt to ranks so that all have equal work."""
    workers: int = 1
    """Decoder processes of this rank; 0 decodes in the training process, where no deadline can be enforced."""
    prefetch: int = 2
    """Steps whose frames are decoded ahead of the one being trained."""
    frame_cache_mb: int = 512
    """Bound of the cache of decoded uint8 frames, in MiB; 0 turns it off."""
    compiled_cache_mb: int = 256
    """Bound of the cache of compiled streams, in MiB, so that later epochs read no JSON."""
    decoder: str = "auto"
    """`auto` (the fastest reader that is right on the file, by what the index knows), `decord`, `pyav` or `torchcodec`
    (whose place PyAV takes where they are known to be wrong or fail)."""
    decode_timeout_s: float = 60.0
    """A decoder process that takes longer over one clip is killed and the sample is quarantined; seconds."""
    decode_memory_mb: int = 8192
    """Most memory that a decoder process may hold, in MiB; a sample that needs more is quarantined."""
    max_frame_pixels: int = 40_000_000
    """Largest picture that is decoded (8K video is 33 megapixels); bounds memory on hostile input."""
    max_media_seconds: float = 43_200.0
    """Longest medium that is decoded; seconds."""
    cache_dir: str | None = None
    """Folder where shards of remote sources are kept; null: `moss_train/shards` in the user's cache folder."""
    cache_gb: float = 100.0
    """Size limit of that folder in GB (10⁹ bytes); the least recently used shards go first."""
    remote_retries: int = 5
    """How often a failed transfer is tried again, after 1, 2, 4, … seconds, before the run stops."""
    remote_timeout_s: float = 60.0
    """A transfer that brings no byte for so long has failed; seconds."""
    max_bad_fraction: float = 0.01
    """Share of each source's samples, rounded up, that may be quarantined before the run stops; 0 allows none."""
    shuffle: bool = True
    """False keeps the order of the index (evaluation, debugging)."""
    shuffle_window_shards: int = 4
    """Samples mix inside windows of this many shards of a source, so that reads stay local."""

    def validate(self) -> None:
        """Raise ConfigError for the first illegal field."""
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one packed folder, data.sources.<name>.path=…")
        for name, source in self.sources.items():
            _validate_source(f"data.sources.{name}", source)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"data.{name}={value} must be at least {least}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"data.{name}={value} must be a number above 0")
        for name, legal in (("decoder", DECODERS), ("over_budget", OVER_BUDGET)):
            if getattr(self, name) not in legal:
                raise ConfigError(f"data.{name}={getattr(self, name)!r} is not one of {', '.join(legal)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction} must lie in 0 … 1")
        _validate_shares(self.shares)
        for name in ("token", "token_squared", "token_frame", "frame"):
            value = getattr(self.cost, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"data.cost.{name}={value} must be at least 0")


def _validate_source(path: str, source: SourceConfig) -> None:
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise ConfigError(f"{path}.weight={source.weight} must be above 0: leave the source out")
    if source.max_samples is not None and source.max_samples < 1:
        raise ConfigError(f"{path}.max_samples={source.max_samples} must be at least 1, or null for no cap")
    if source.max_epochs is not None and not source.max_epochs > 0:
        raise ConfigError(f"{path}.max_epochs={source.max_epochs} must be above 0, or null for no cap")


def _validate_shares(shares: dict[str, float]) -> None:
    for modality, share in shares.items():
        if modality not in MODALITIES:
            raise ConfigError(f"data.shares.{modality} is no modality: use {', '.join(MODALITIES)}")
        if not (math.isfinite(share) and share >= 0):
            raise ConfigError(f"data.shares.{modality}={share} must be at least 0")
    if shares and not math.isclose(sum(shares.values()), 1.0, abs_tol=0.01):
        raise ConfigError(f"data.shares sum to {sum(shares.values()):g}, not to 1: {dict(shares)}")


_LEAST = {
    "temperature": 1.0,
    "global_batch_size": 1,
    "micro_batch_rows": 1,
    "pack_text_tokens": 1,
    "pack_frames": 1,
    "workers": 0,
    "prefetch": 0,
    "frame_cache_mb": 0,
    "compiled_cache_mb": 0,
    "decode_memory_mb": 256,
    "max_frame_pixels": 1,
    "remote_retries": 0,
    "shuffle_window_shards": 1,
}
_ABOVE_ZERO = ("decode_timeout_s", "max_media_seconds", "cache_gb", "remote_timeout_s")
