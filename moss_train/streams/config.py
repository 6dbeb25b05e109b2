"""Configuration of the tokenizer and of the stream compiler."""

from dataclasses import dataclass, field

from moss_train.errors import ConfigError
from moss_train.streams.sight import POSITION_SCHEMES

#: role of a special token -> the string that stands for it in the reference's tokenizer (model_facts B)
REFERENCE_SPECIAL_STRINGS: dict[str, str] = {
    "begin_of_text": "<|begin_of_text|>",
    "end_of_text": "<|end_of_text|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "end_of_turn": "<|eot_id|>",
    "silence": "<|silence|>",
    "video": "<|video|>",
    "anchor": "<|image|>",
    "padding": "<|finetune_right_pad_id|>",
    "ellipsis": "<|...|>",
}

#: how the frames of an offline video are chosen
SAMPLING_MODES = ("reference", "uniform", "fixed_rate")

OPTIONAL_ROLES = frozenset({"ellipsis"})


@dataclass
class TokenizerConfig:
    """Which tokenizer, and which of its tokens plays which role."""

    path: str | None = None
    """A Hugging Face `tokenizer.json` or the folder that holds one; null = the small one shipped with the package."""

    special: dict[str, str] = field(default_factory=dict)
    """Role -> string, for tokenizers that do not use the reference's strings; unnamed roles keep the reference's."""

    special_ids: dict[str, int] = field(default_factory=dict)
    """Role -> id, for roles played by a reserved token under another name (wins over `special`)."""

    vocabulary_size: int | None = None
    """Rows of the output head; null = every id of the tokenizer, less the anchor when that is the last id."""

    def validate(self) -> None:
        for name, roles in (("special", self.special), ("special_ids", self.special_ids)):
            for role in roles:
                if role not in REFERENCE_SPECIAL_STRINGS:
                    legal = ", ".join(REFERENCE_SPECIAL_STRINGS)
                    raise ConfigError(f"tokenizer.{name}: {role!r} is no role of a special token; use one of {legal}")
        for role, token in self.special_ids.items():
            if token < 0:
                raise ConfigError(f"tokenizer.special_ids.{role}={token} is negative; give the token's id")
        if self.vocabulary_size is not None and self.vocabulary_size < 1:
            raise ConfigError(
                f"tokenizer.vocabulary_size={self.vocabulary_size} must be positive; "
                "leave it null to take the tokenizer's own size"
            )


@dataclass
class CompilerConfig:
    """How samples become token rows. Defaults are those of the reference's real-time stage, jitter excepted."""

    fps: float = 1.0
    """Frames a second, where the sample does not say; the reference trains at 1 (2 in pretraining)."""

    sampling: str = "reference"
    """Which frames of an offline video: `reference` (one every 1 / fps seconds, evenly spread where that is too few or
    too many), `uniform` (`max_frames`, evenly spread, whatever its length) or `fixed_rate` (one every 1 / fps seconds;
    a video with more than `max_frames` of them is refused). A sample's own `times_s` win. Streams have a fixed rate."""

    min_frames: int = 1
    """Fewest frames of an offline video, if it has as many; the reference uses 8 offline."""

    max_frames: int = 256
    """Most frames of a video: longer offline videos are sampled evenly, longer streams are refused, or cut where the
    loader splits."""

    tokens_per_second: float = 38.0
    """Rate at which a reply without exact times is emitted; 38 is the reference's measured decoding speed."""

    jitter_probability: float = 0.0
    """Chance that a frame inside a reply arrives one token early; the reference uses 0.5, off by default."""

    window: int | None = None
    """A token sees at most this many of the latest frames; null = all that have arrived."""

    sinks: int = 0
    """First frames of a stream that stay visible beside the window; needs `window`."""

    text_window: int | None = None
    """A token attends to at most this many of the latest tokens, itself and anchors included; null = to all."""

    text_sinks: int = 0
    """First tokens of a stream that stay visible beside the text window (the system prompt); needs `text_window`."""

    positions: str = "shared"
    """Rotary positions: `shared` (a frame stands where its anchor stands in the text, as in MOSS-Video-Preview) or
    `decoupled` (text and frames have an axis each: an anchor takes no place in the text, frame f stands at f and a
    token looks at the frames from where the latest of them stands, as TaYS' group positions)."""

    train_turn_end_offline: bool = True
    """Train the end-of-turn token in conversations, as the reference does (never in streams: silence ends a reply)."""

    pretrain_template: bool = True
    """Captions as begin + content + end of text (the reference's pretraining); false = as one chat turn."""

    stale_silence_guard: bool = True
    """Mark silence between a revision's evidence and the revision as stale: the standing answer is wrong by then."""

    def validate(self) -> None:
        self._require("sampling", self.sampling in SAMPLING_MODES, f"is none of {', '.join(SAMPLING_MODES)}")
        self._require("fps", self.fps > 0, "must be above 0 frames a second")
        self._require("min_frames", self.min_frames >= 1, "must be at least 1")
        self._require("max_frames", self.max_frames >= self.min_frames, f"must be at least {self.min_frames=}")
        self._require("tokens_per_second", self.tokens_per_second > 0, "must be above 0")
        self._require("jitter_probability", 0.0 <= self.jitter_probability <= 1.0, "must lie in [0, 1]")
        self._require(
            "window", self.window is None or self.window >= 1, "must be at least 1 frame, or null for no window"
        )
        self._require("sinks", self.sinks >= 0, "must not be negative")
        self._require("sinks", self.sinks == 0 or self.window is not None, "has no effect without compiler.window")
        self._require(
            "text_window", self.text_window is None or self.text_window >= 1, "must be at least 1 token, or null"
        )
        self._require("text_sinks", self.text_sinks >= 0, "must not be negative")
        self._require(
            "text_sinks",
            self.text_sinks == 0 or self.text_window is not None,
            "has no effect without compiler.text_window",
        )
        self._require("positions", self.positions in POSITION_SCHEMES, f"is none of {', '.join(POSITION_SCHEMES)}")

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"compiler.{name}={getattr(self, name)!r} {remedy}")
