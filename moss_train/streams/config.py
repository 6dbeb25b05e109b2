"""Configuration of the tokenizer and of the stream compiler."""

from dataclasses import dataclass, field, replace
from math import inf

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

#: role -> string of the tokens of think units, which the reference does not have; `skip` stands in an empty unit
THINK_STRINGS: dict[str, str] = {"think_start": "<think>", "think_end": "</think>", "skip": "<skip>"}

SPECIAL_STRINGS = REFERENCE_SPECIAL_STRINGS | THINK_STRINGS

#: how the frames of an offline video are chosen
SAMPLING_MODES = ("reference", "uniform", "fixed_rate")

OPTIONAL_ROLES = frozenset({"ellipsis", *THINK_STRINGS})

#: what tokens see of the frames, see `CompilerConfig.visibility`
VISIBILITIES = ("streaming", "offline")

#: when frames that arrive during a reply are seen, see `CompilerConfig.perceive`
PERCEPTIONS = ("overlapped", "blocked")

#: what becomes of think units
THINK_MODES = ("keep", "drop")


@dataclass
class TokenizerConfig:
    """Which tokenizer, and which of its tokens plays which role."""

    path: str | None = None
    """A Hugging Face `tokenizer.json` or the folder that holds one; null = the small one shipped with the package."""

    special: dict[str, str] = field(default_factory=dict)
    """Role -> string, for tokenizers that do not use the reference's strings; unnamed roles keep the reference's."""

    special_ids: dict[str, int] = field(default_factory=dict)
    """Role -> id, for roles played by a reserved token under another name (wins over `special`)."""

    think_tokens: bool = False
    """Give a tokenizer that lacks them tokens for think units (`<think>`, `</think>`, `<skip>`), as ids after its last;
    the head then has rows for them. For a model whose head cannot grow, name reserved tokens in `special_ids`."""

    vocabulary_size: int | None = None
    """Rows of the output head; null = every id of the tokenizer, less the anchor when that is the last id."""

    def validate(self) -> None:
        for name, roles in (("special", self.special), ("special_ids", self.special_ids)):
            for role in roles:
                if role not in SPECIAL_STRINGS:
                    legal = ", ".join(SPECIAL_STRINGS)
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
class AugmentationConfig:
    """What is drawn at random for a stream, always from (seed, epoch, key). Off by default."""

    window_range: list[int] | None = None
    """[lo, hi]: `compiler.window` is drawn from it, both ends included; null = it is what it is."""

    sink_range: list[int] | None = None
    """[lo, hi]: the same for `compiler.sinks`."""

    text_window_range: list[int] | None = None
    """[lo, hi]: the same for `compiler.text_window`."""

    text_sink_range: list[int] | None = None
    """[lo, hi]: the same for `compiler.text_sinks`."""

    keep_silence: float = 1.0
    """Share of the idle silences that are trained; the others stay in the row, untrained. Those near a transition
    (the beginning or end of a reply, a user's turn, a confirmation) always are."""

    keep_silence_within_s: float = 2.0
    """What is near: at most so many seconds away."""

    corruption: float = 0.0
    """Chance that one reply of a stream is replaced by a wrong one, or left out (VideoLLM-online's augmentation)."""

    corruption_emptied: float = 0.33
    """Of the replies that are corrupted, the share that is left out instead of replaced."""

    corruption_texts: list[str] = field(default_factory=list)
    """Wrong replies to choose from, beside the other replies of the same stream."""

    correction: float = 0.5
    """Of the corrupted replies, the share that is corrected one frame later, and the correction learned. Otherwise the
    wrong reply stands, and the silence on it is not trained until the next reply or user turn."""

    correction_prefix: str = ""
    """What a correction of a wrong reply begins with, e.g. "Sorry, I was wrong. "."""

    interruption: float = 0.0
    """Chance that the user cuts a reply of a stream that runs over several frames, at a random one of them."""

    interruption_texts: list[str] = field(default_factory=lambda: ["Stop."])
    """What the user says then, one at random."""

    variants: int = 4
    """Corruption and interruption change how long a stream is, and batches are planned by exact lengths. So every
    stream has so many augmented variants, measured once beside the plain one; an epoch draws the plain one or a
    variant. More are more various and take longer to measure."""

    @property
    def varies(self) -> float:
        """The chance that a stream is changed in what is said in it, and so in its length."""
        return 1.0 - (1.0 - self.corruption) * (1.0 - self.interruption)

    @property
    def measured_variants(self) -> int:
        """Variants of a stream that must be measured; 0 when nothing changes lengths."""
        return self.variants if self.varies > 0 else 0

    @property
    def lengthless(self) -> bool:
        """Whether something is drawn anew every epoch on which no length depends."""
        ranges = (self.window_range, self.sink_range, self.text_window_range, self.text_sink_range)
        return self.keep_silence < 1.0 or any(limits is not None for limits in ranges)

    def validate(self, compiler: "CompilerConfig") -> None:
        for name, windowed, least in (
            ("window_range", True, 1),
            ("sink_range", self.window_range is not None or compiler.window is not None, 0),
            ("text_window_range", True, 1),
            ("text_sink_range", self.text_window_range is not None or compiler.text_window is not None, 0),
        ):
            limits = getattr(self, name)
            if limits is None:
                continue
            legal = len(limits) == 2 and least <= limits[0] <= limits[1]
            self._require(name, legal, f"must be [lo, hi] with {least} <= lo <= hi, or null")
            self._require(name, windowed, "has no effect without a window; set one, or its range")
        for name in ("keep_silence", "corruption", "corruption_emptied", "correction", "interruption"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "must lie in [0, 1]")
        self._require("keep_silence_within_s", self.keep_silence_within_s >= 0, "must not be negative")
        self._require("variants", 1 <= self.variants <= 64, "must lie in [1, 64]")
        for name in ("corruption_texts", "interruption_texts"):
            blank = any(not text.strip() for text in getattr(self, name))
            self._require(name, not blank, "holds a blank text; remove it")
        self._require("interruption_texts", bool(self.interruption_texts), "is empty; name at least one text")

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"compiler.augment.{name}={getattr(self, name)!r} {remedy}")


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
    """Chance that a frame inside a reply arrives at another token; the reference uses 0.5, off by default."""

    jitter_shifts: list[int] = field(default_factory=lambda: [-1])
    """By how many tokens such a frame moves, one at random; negative is earlier. The reference has one token earlier;
    [-2, -1, 1, 2] moves frames both ways. It never leaves the reply nor overtakes the decision to speak."""

    window: int | None = None
    """A token of a stream sees at most this many of the latest frames; null = all that have arrived. Media that come
    whole, in captions and conversations, are seen whole."""

    sinks: int = 0
    """First frames of a stream that stay visible beside the window; needs `window`."""

    text_window: int | None = None
    """A token of a stream attends to at most this many of the latest tokens, itself and anchors included; null = to
    all."""

    text_sinks: int = 0
    """First tokens of a stream that stay visible beside the text window (the system prompt); needs `text_window`."""

    positions: str = "shared"
    """Rotary positions: `shared` (a frame stands where its anchor stands in the text, as in MOSS-Video-Preview) or
    `decoupled` (text and frames have an axis each: an anchor takes no place in the text, frame f stands at f and a
    token looks at the frames from where the latest of them stands, as TaYS' group positions)."""

    visibility: str = "streaming"
    """`streaming`: a token sees the frames that have arrived. `offline`: every token of a stream sees all its frames,
    the future included: what the streaming mask is worth is measured against it. A live model never sees the future."""

    perceive: str = "overlapped"
    """`overlapped`: frames that arrive during a reply stand inside it, and its later tokens see them. `blocked`: no new
    frames during a reply; they come after the silence that ends it, and only at the last of them is decided anew."""

    train_turn_end_offline: bool = True
    """Train the end-of-turn token in conversations, as the reference does."""

    train_turn_end_streams: bool = False
    """Train it in streams too, where a turn is not cut inside a reply. The reference does not: silence ends a reply,
    and the user's next words, not the model, end the turn."""

    pretrain_template: bool = True
    """Captions as begin + content + end of text (the reference's pretraining); false = as one chat turn."""

    stale_silence_guard: bool = True
    """Mark silence between a revision's evidence and the revision as stale: the standing answer is wrong by then."""

    confirmation_weight: float = 1.0
    """Weight of the silence at confirmations, where something changes and the standing answer holds; 0 = untrained."""

    think: str = "keep"
    """Think units: `keep` them as text between think marks, or `drop` them."""

    augment: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of streams in training; evaluation has none."""

    @staticmethod
    def from_json(fields: dict) -> "CompilerConfig":
        """Of `dataclasses.asdict`."""
        return CompilerConfig(**fields | {"augment": AugmentationConfig(**fields["augment"])})

    @property
    def augmented(self) -> bool:
        """Whether a stream differs from epoch to epoch."""
        return self.jitter_probability > 0 or self.augment.lengthless or self.augment.varies > 0

    def plain(self) -> "CompilerConfig":
        """The same without anything random: what evaluation compiles with."""
        return replace(self, jitter_probability=0.0, augment=AugmentationConfig())

    def doubts(self) -> list[str]:
        """What is legal and perhaps not meant, a line each."""
        found = []
        for name, seen in (("window", "frames"), ("text_window", "tokens")):
            limits = getattr(self.augment, f"{name}_range")
            if limits is not None and getattr(self, name) is None:
                found.append(
                    f"compiler.augment.{name}_range={limits}: compiler.{name}=null, so what is trained with windows is "
                    f"evaluated and served without one, over all {seen}; set compiler.{name} unless that is meant"
                )
        return found

    def validate(self) -> None:
        self._require("sampling", self.sampling in SAMPLING_MODES, f"is none of {', '.join(SAMPLING_MODES)}")
        self._require("fps", self.fps > 0, "must be above 0 frames a second")
        self._require("min_frames", self.min_frames >= 1, "must be at least 1")
        self._require("max_frames", self.max_frames >= self.min_frames, f"must be at least {self.min_frames=}")
        self._require("tokens_per_second", self.tokens_per_second > 0, "must be above 0")
        self._require("jitter_probability", 0.0 <= self.jitter_probability <= 1.0, "must lie in [0, 1]")
        shifts = self.jitter_shifts
        self._require("jitter_shifts", bool(shifts) and 0 not in shifts, "must name whole numbers other than 0")
        self._require("jitter_shifts", all(abs(shift) <= 64 for shift in shifts), "must lie in [-64, 64]")
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
        for name, legal in (
            ("positions", POSITION_SCHEMES),
            ("visibility", VISIBILITIES),
            ("perceive", PERCEPTIONS),
            ("think", THINK_MODES),
        ):
            self._require(name, getattr(self, name) in legal, f"is none of {', '.join(legal)}")
        windowed = self.window is not None or self.augment.window_range is not None
        self._require(
            "visibility",
            self.visibility == "streaming" or not windowed,
            "sees all frames of a row; set compiler.window and compiler.augment.window_range to null",
        )
        self._require(
            "jitter_probability",
            self.jitter_probability == 0.0 or self.perceive == "overlapped",
            "has no effect with compiler.perceive=blocked, where no frame arrives inside a reply; set it to 0",
        )
        self._require("confirmation_weight", 0.0 <= self.confirmation_weight < inf, "must be a number of at least 0")
        self.augment.validate(self)

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"compiler.{name}={getattr(self, name)!r} {remedy}")
