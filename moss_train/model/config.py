"""Sizes of the model. Named sizes live in `recipes/model/*.yaml`; one dataclass per part."""

from dataclasses import dataclass, field

from moss_train.errors import ConfigError


@dataclass
class VisionConfig:
    """The vision tower: a ViT over one frame (one tile), local layers then gated global layers."""

    hidden_size: int = 1280
    """Width of the tower."""
    local_layers: int = 32
    """Ungated layers, from which the intermediate maps are taken."""
    global_layers: int = 8
    """Gated layers after the local ones."""
    attention_heads: int = 16
    """Heads; the head width is hidden_size / attention_heads."""
    mlp_size: int = 5120
    """Width of the feed-forward layers."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    image_size: int = 560
    """Side of a frame in pixels; frames are resized and padded to this square."""
    max_tiles: int = 4
    """Tiles the position tables hold; one is used per frame."""
    aspect_ratios: int = 8
    """Aspect-ratio ids the position tables hold, besides id 0 (padding); one tile is id 1."""
    intermediate_layers: list[int] = field(default_factory=lambda: [3, 7, 15, 23, 30])
    """The inputs of these local layers are features too, interleaved channel by channel after the final map."""
    norm_eps: float = 1e-5
    """Epsilon of the layer norms."""
    full_attention: bool = True
    """Attend without a mask, as MOSS-Video-Preview trains; false masks padding against padding, as Llama-3.2 does."""

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def feature_size(self) -> int:
        """Channels that reach the projector: the final map and every intermediate one."""
        return self.hidden_size * (1 + len(self.intermediate_layers))


@dataclass
class RopeScaling:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3` in transformers)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass
class TextConfig:
    """The decoder: self layers with gated cross layers between them."""

    vocabulary_size: int | None = 128256
    """Rows of the head; null takes the tokenizer's, and must be filled in before a model is built."""
    extra_embedding_rows: int = 8
    """Embedding rows beyond the head, for input-only tokens such as the frame anchor."""
    hidden_size: int = 4096
    """Width of the decoder."""
    layers: int = 40
    """Layers in all, cross layers counted in."""
    cross_layers: list[int] = field(default_factory=lambda: [3, 8, 13, 18, 23, 28, 33, 38])
    """Which of the layers attend to frames instead of text."""
    attention_heads: int = 32
    """Query heads; the head width is hidden_size / attention_heads."""
    key_value_heads: int = 8
    """Key and value heads, shared by groups of query heads."""
    mlp_size: int = 14336
    """Width of the gated feed-forward layers."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    """Scaling of the rotary frequencies; null for none."""


RECOMPUTED = ("none", "selective", "full")


@dataclass
class RecomputeConfig:
    """What the backward pass computes again instead of keeping it from the forward pass."""

    self_layers: str = "none"
    """Self layers: none; selective (the attending and the gated product of the feed-forward); full (whole layers)."""
    cross_layers: str = "none"
    """Cross layers: none; selective (keys and values of the frames, the attending, the gated product); full."""
    tower: bool = False
    """The vision tower's layers, by chunks of frames. It is always recomputed with `layout.frame_shard=model_parallel`
    while it is trained."""
    tower_frames: int | None = None
    """Frames that go through the tower at a time; null: all of a microbatch's."""
    head_positions: int | None = None
    """Trained positions whose logits exist at a time, and are computed again in the backward pass; null: those of all
    trained positions of a microbatch, kept."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("self_layers", "cross_layers"):
            if getattr(self, name) not in RECOMPUTED:
                raise ConfigError(f"recompute.{name}={getattr(self, name)!r}: legal values are {', '.join(RECOMPUTED)}")
        if self.tower_frames is not None and self.tower_frames < 1:
            raise ConfigError(f"recompute.tower_frames={self.tower_frames}: must be at least 1, or null for all")
        if self.head_positions is not None and self.head_positions < 1:
            raise ConfigError(f"recompute.head_positions={self.head_positions}: must be at least 1, or null for all")


@dataclass
class ModelConfig:
    """A gated cross-attention video model."""

    name: str = "moss_video_11b"
    """Name shown in reports."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pool: str = "average"
    """How patches of a frame are pooled before the projector: average, max, or none (all patches are kept)."""
    pool_stride: int = 4
    """Side of the square of patches that becomes one vision token."""
    cross_rope: bool = True
    """Rotate cross-attention queries and keys by text and anchor positions (MOSS-Video-Preview); Llama-3.2 does not."""
    reference_compat: bool = False
    """Reproduce the reference's leak: tokens that see no frame attend to every frame. For parity checks only."""
    decision_head: bool = False
    """A second head that says, at each frame's anchor, whether to speak now (docs/objectives.md). It starts from zeros;
    weights without one can start a model with one."""
    encode_once: bool = True
    """Encode frames of a microbatch that are alike once. Equal to encoding each up to rounding (1e-6 in float32)."""
    attention: str = "segments"
    """Attention over visibility ranges: segments (runs of equal visibility), flex (experimental: FlexAttention over
    block masks, on CUDA; where frames are shared out over processes it is segments too), or dense (for tests)."""
    initial_gate: float = 0.0
    """Value of the cross layers' gates before training; 0 leaves a pretrained decoder unchanged at step 0."""
    init_std: float = 0.02
    """Standard deviation of freshly initialised weights."""

    @property
    def tokens_per_frame(self) -> int:
        """Vision tokens of one frame: the class token and the pooled patches."""
        if self.pool == "none":
            return 1 + self.vision.patches
        return 1 + (self.vision.image_size // self.vision.patch_size // self.pool_stride) ** 2

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be, with a legal value."""
        vision, text = self.vision, self.text
        side = vision.image_size // vision.patch_size
        rules = [
            (vision.image_size % vision.patch_size == 0, "vision.image_size", "a multiple of vision.patch_size"),
            (vision.hidden_size % vision.attention_heads == 0, "vision.attention_heads", "a divisor of hidden_size"),
            (
                all(0 <= i < vision.local_layers for i in vision.intermediate_layers),
                "vision.intermediate_layers",
                f"indices below vision.local_layers={vision.local_layers}",
            ),
            (text.hidden_size % text.attention_heads == 0, "text.attention_heads", "a divisor of hidden_size"),
            ((text.hidden_size // text.attention_heads) % 2 == 0, "text.attention_heads", "such that heads are even"),
            (
                text.attention_heads % text.key_value_heads == 0,
                "text.key_value_heads",
                "a divisor of text.attention_heads",
            ),
            (
                all(0 <= i < text.layers for i in text.cross_layers)
                and sorted(set(text.cross_layers)) == list(text.cross_layers),
                "text.cross_layers",
                f"increasing indices below text.layers={text.layers}",
            ),
            (self.pool in ("average", "max", "none"), "pool", "average, max or none"),
            (self.pool == "none" or side % self.pool_stride == 0, "pool_stride", f"a divisor of {side} patches a side"),
            (self.attention in ("segments", "flex", "dense"), "attention", "segments, flex or dense"),
            (text.extra_embedding_rows >= 0, "text.extra_embedding_rows", "0 or more"),
        ]
        for legal, name, remedy in rules:
            if not legal:
                value = self
                for part in name.split("."):
                    value = getattr(value, part)
                raise ConfigError(f"model.{name}={value}: must be {remedy}")
