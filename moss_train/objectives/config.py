"""What the loss weighs: one factor per kind of label, the focal exponent and the denominator."""

from dataclasses import dataclass, field

from moss_train.errors import ConfigError
from moss_train.streams.compiled import Kind

TRAINED_KINDS = tuple(kind for kind in Kind if kind is not Kind.IGNORED)

#: Every kind counts once, except replies known to be wrong. Together with γ = 0 this is plain cross-entropy.
DEFAULT_WEIGHTS = {kind.name.lower(): 1.0 for kind in TRAINED_KINDS} | {Kind.STALE.name.lower(): 0.0}

NORMALISERS = ("valid", "weights")
BALANCES = ("none", "state")


@dataclass
class ObjectiveConfig:
    """L = Σ wᵢ (1−pᵢ)^γ CEᵢ / Z over the labels of the global batch, and two parts more: of the decision head and of
    margins. The formulas stand in docs/objectives.md."""

    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """Factor of each kind of label (text, onset, idle_silence, stop_silence, revision, stale, think); a kind that is
    not named keeps its default: 1.0, as the reference trains, and 0.0 for stale, which the reference does not have."""
    focal_gamma: float = 0.0
    """γ of the focal factor, on state labels only (silences and the first token of a reply); 0 is off, as the
    reference trains; 2 is Streamo's value."""
    normaliser: str = "valid"
    """Z: "valid" counts the trained labels whatever their weight (the reference's rule); "weights" sums weights."""
    balance: str = "none"
    """"state" makes silences (idle and stop) and first tokens of replies weigh the same in all: each is multiplied by
    α = (silences + starts) / (2 × how many there are of its kind), counted over the global batch (MOSS-VL)."""
    frame_position_weight: float | None = None
    """Multiplies every label that is predicted at a frame's anchor, whatever it is: the decision to stay silent and the
    decision to speak alike (VideoLLM-online's stream loss weight). Null is off, as is 1.0."""
    decision_head_weight: float | None = None
    """Weight of the decision head's loss beside L, where the model has one (`model.decision_head`); null is 1.0. 0
    keeps the head and does not train it. A number without such a head is refused."""
    margin: float | None = None
    """Experimental. By how many nats the log-probability of a revision's first new token should be above that of the
    token that the superseded reply has there (`contrasts` of the compiler); null is off, 0 asks for "at least"."""
    margin_weight: float = 1.0
    """Weight of the mean shortfall of these margins beside L."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be, with the legal values."""
        for name, weight in self.weights.items():
            if name not in DEFAULT_WEIGHTS:
                raise ConfigError(
                    f"objective.weights.{name}: no such kind; legal kinds are {', '.join(DEFAULT_WEIGHTS)}"
                )
            if not 0.0 <= weight < float("inf"):
                raise ConfigError(f"objective.weights.{name}={weight}: must be a number of at least 0")
        if not 0.0 <= self.focal_gamma < float("inf"):
            raise ConfigError(f"objective.focal_gamma={self.focal_gamma}: must be at least 0; 0 switches it off")
        if self.normaliser not in NORMALISERS:
            raise ConfigError(f"objective.normaliser={self.normaliser!r}: legal values are {', '.join(NORMALISERS)}")
        if self.balance not in BALANCES:
            raise ConfigError(f"objective.balance={self.balance!r}: legal values are {', '.join(BALANCES)}")
        for name, off in (("frame_position_weight", True), ("decision_head_weight", True), ("margin", True),
                          ("margin_weight", False)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                remedy = ", or null" if off else ""
                raise ConfigError(f"objective.{name}={value}: must be a number of at least 0{remedy}")
        if all(weight == 0.0 for weight in self.weight_by_kind()[1:]):
            raise ConfigError("objective.weights: every kind has weight 0, so nothing would be trained")

    def weight_by_kind(self) -> list[float]:
        """The factor of each kind, indexed by the value of `Kind`; that of IGNORED is 0."""
        named = DEFAULT_WEIGHTS | dict(self.weights)
        return [0.0 if kind is Kind.IGNORED else float(named[kind.name.lower()]) for kind in Kind]
