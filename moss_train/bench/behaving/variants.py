"""The full method of the quickstart's recipe, and the same with one piece taken away."""

from dataclasses import dataclass

REALTIME = "stages.realtime"


@dataclass(frozen=True)
class Variant:
    """One way to train the real-time stage; all start from the same earlier stages."""

    name: str
    removed: str  #: what is taken away, for people
    overrides: tuple[str, ...] = ()  #: of `moss-train train recipe=quickstart`
    trains: bool = True  #: False: there is no real-time stage, the model before it is scored
    source: str = "realtime"  #: which packed streams it learns from


FULL = Variant("full", "nothing: the full method")
SYNTH = Variant("synth", "rendered ground truth: streams synthesised from captions instead", source="realtime_synth")
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        FULL,
        Variant(
            "offline_mask",
            "streaming-causal mask: in training every token sees all frames of its stream",
            (
                f"{REALTIME}.compiler.visibility=offline",
                f"{REALTIME}.compiler.window=null",
            ),
        ),
        Variant("no_realtime", "real-time stage", trains=False),
        Variant(
            "no_silence_weighting",
            "silence weighting: idle silence weighs as much as any word",
            (f"{REALTIME}.objective.weights.idle_silence=1",),
        ),
        Variant(
            "no_revision_augmentation",
            "revision augmentation: no past answer is corrupted",
            (f"{REALTIME}.compiler.augment.corruption=0",),
        ),
        Variant(
            "no_confirmations",
            "confirmation negatives: silence is not taught where something else changes",
            (f"{REALTIME}.compiler.confirmation_weight=0",),
        ),
        Variant("no_jitter", "arrival jitter", (f"{REALTIME}.compiler.jitter_probability=0",)),
        SYNTH,
    )
}
#: earlier stages, shared by all variants of a seed
SHARED = "shared"

#: what is asked of the full method: least or most of a figure, means over the seeds
LEAST = {"speak_f1": 0.97, "silence_f1": 0.97, "revision_accuracy": 0.95}
MOST = {"revision_delay_frames": 1.0, "false_revision_rate": 0.02}
#: points of offline accuracy that the real-time stage may cost, and that synthesised data may lie below rendered data
MOST_OFFLINE_LOST = 0.01
MOST_SYNTH_GAP = 0.05
#: of design §7, by variant
FIGURES = (
    "speak_f1",
    "silence_f1",
    "answer_accuracy",
    "revision_accuracy",
    "revision_delay_frames",
    "false_revision_rate",
    "offline_accuracy",
)
#: figures of which the synth gap is the largest difference
GAP_FIGURES = ("speak_f1", "silence_f1", "answer_accuracy", "revision_accuracy")
