"""Parameter groups by exact name, and the presets that say which of them a stage trains.

Groups are decided from the module a parameter belongs to, never by substring: the reference's freezing matched
`layers.1` in `layers.13` and froze half of its cross layers by accident (`model_facts.md` D.2).
"""

from collections.abc import Iterable

from moss_train.errors import ConfigError
from moss_train.model.layers import CrossLayer

GROUPS = (
    "vision_tower",
    "projector",
    "cross_layers",
    "self_layers",
    "embedding",
    "anchor_embedding",
    "final_norm",
    "head",
    "decision_head",
)

PRESETS: dict[str, tuple[str, ...]] = {
    "all": GROUPS,
    "projector_only": ("projector",),
    "projector_xattn": ("projector", "cross_layers"),
    "vision_projector_xattn": ("vision_tower", "projector", "cross_layers"),
    "language_model": (
        "cross_layers",
        "self_layers",
        "embedding",
        "anchor_embedding",
        "final_norm",
        "head",
        "decision_head",
    ),
}

#: What the reference's published pretraining really trained, through its substring match (of 40 layers).
REFERENCE_BUG = "reference_bug"


def parameter_groups(model) -> dict[str, str]:
    """The group of every parameter of `model`, by exact parameter name."""
    cross = {f"layers.{layer.index}" for layer in model.decoder_layers if isinstance(layer, CrossLayer)}
    groups = {}
    for name, _ in model.named_parameters():
        first, second = (name.split(".") + [""])[:2]
        if first == "layers":
            groups[name] = "cross_layers" if f"{first}.{second}" in cross else "self_layers"
        elif first == "embedding":
            groups[name] = "anchor_embedding" if second == "extra" else "embedding"
        else:
            groups[name] = first
    return groups


def resolve_groups(trainable: str | Iterable[str]) -> tuple[str, ...]:
    """A preset's name or a list of groups as a tuple of groups; ConfigError names what is unknown."""
    if isinstance(trainable, str):
        if trainable not in PRESETS:
            legal = ", ".join([*PRESETS, REFERENCE_BUG])
            raise ConfigError(f"trainable={trainable!r}: no such preset; legal presets are {legal}")
        return PRESETS[trainable]
    unknown = [group for group in trainable if group not in GROUPS]
    if unknown:
        raise ConfigError(f"trainable: no such group {', '.join(unknown)}; groups are {', '.join(GROUPS)}")
    return tuple(trainable)


def trainable_names(model, trainable: str | Iterable[str]) -> set[str]:
    """Exact names of the parameters that a stage trains."""
    groups = parameter_groups(model)
    if trainable == REFERENCE_BUG:
        frozen = _frozen_by_substring(model)
        return {n for n, g in groups.items() if g in PRESETS["vision_projector_xattn"] and n not in frozen}
    chosen = resolve_groups(trainable)
    return {name for name, group in groups.items() if group in chosen}


def _frozen_by_substring(model) -> set[str]:
    """Names frozen by matching the self layers' `layers.<i>` without a trailing dot."""
    patterns = [f"layers.{layer.index}" for layer in model.decoder_layers if not isinstance(layer, CrossLayer)]
    names = [n for n, _ in model.named_parameters() if n.startswith("layers.")]
    return {name for name in names if any(name.startswith(pattern) for pattern in patterns)}
