"""Settings of evaluation."""

from dataclasses import dataclass

from moss_train.errors import ConfigError

DECIDE_BY = ("tokens", "head")


@dataclass
class DecodeConfig:
    """How the model's own reply is read from its predictions."""

    decide_by: str = "tokens"
    """Who decides at a frame whether an idle model speaks: `tokens`, the next one being silence or not, or `head`, the
    model's decision head. What is said is read from the tokens in either case, as is when a reply ends."""
    head_threshold: float | None = None
    """decide_by=head alone: speak iff the head's P(speak) is at least this (0 to 1); null is 0.5."""
    speak_threshold: float | None = None
    """decide_by=tokens alone: speak at an idle slot iff P(silence) is below this (0 to 1); null takes the most probable
    token, as in training with weights of 1."""
    last_slot_tokens: int = 64
    """Most tokens said after the last frame, where nothing arrives any more that could end the slot."""
    think_tokens: int = 32
    """Most tokens of a think unit; a longer one is closed for the model."""

    @property
    def speaks_from(self) -> float:
        """The least P(speak) of the decision head at which an idle model speaks."""
        return 0.5 if self.head_threshold is None else self.head_threshold

    def validate(self) -> None:
        if self.decide_by not in DECIDE_BY:
            raise ConfigError(f"decode.decide_by={self.decide_by!r}: legal values are {', '.join(DECIDE_BY)}")
        other, unread = {"tokens": ("head", "head_threshold"), "head": ("tokens", "speak_threshold")}[self.decide_by]
        if getattr(self, unread) is not None:
            raise ConfigError(
                f"decode.{unread}={getattr(self, unread)}: it is for decode.decide_by={other}, and decode.decide_by is "
                f"{self.decide_by}; leave it out"
            )
        if self.head_threshold is not None and not 0.0 <= self.head_threshold <= 1.0:
            raise ConfigError(
                f"decode.head_threshold={self.head_threshold}: must lie between 0 and 1, or be null for 0.5"
            )
        if self.speak_threshold is not None and not 0.0 < self.speak_threshold <= 1.0:
            raise ConfigError(
                f"decode.speak_threshold={self.speak_threshold}: must be above 0 and at most 1, "
                "or null to take the most probable token"
            )
        if self.last_slot_tokens < 1:
            raise ConfigError(f"decode.last_slot_tokens={self.last_slot_tokens}: must be at least 1")
        if self.think_tokens < 1:
            raise ConfigError(f"decode.think_tokens={self.think_tokens}: must be at least 1")


@dataclass
class EvaluationConfig:
    """How a corpus of streams is evaluated."""

    batch_streams: int = 32
    """Streams decoded at once; more is faster and takes more memory."""
    window_frames: int = 2
    """How many frames late an answer or a revision may be and still count."""
    limit: int | None = None
    """Evaluate only so many streams (and offline conversations), the first of the source's index; null for all."""
    tolerance_s: float = 1.0
    """Seconds between the beginnings of two replies that still match each other (trigger F1)."""
    answer_tokens: int = 64
    """Most tokens of an answer to an offline question."""
    cache_mb: int = 512
    """Most memory for the decoded frames of held-out samples, MB (10⁶ bytes) a process, so that the next evaluation
    finds them; what is beyond is decoded again each time. 0 keeps none."""

    def validate(self) -> None:
        least_of = {"batch_streams": 1, "window_frames": 0, "limit": 1, "tolerance_s": 0, "answer_tokens": 1}
        for name, least in (least_of | {"cache_mb": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"evaluate.settings.{name}={value}: must be at least {least}")
