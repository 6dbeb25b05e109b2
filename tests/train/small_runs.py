"""The overrides of a run that takes seconds."""

from pathlib import Path

#: a model of a few thousand parameters, two short stages, no trackers
SMALL = [
    "model.vision.hidden_size=16", "model.vision.local_layers=1", "model.vision.intermediate_layers=[0]",
    "model.vision.attention_heads=2", "model.vision.mlp_size=32", "model.vision.image_size=28",
    "model.text.hidden_size=16", "model.text.layers=2", "model.text.cross_layers=[1]", "model.text.attention_heads=2",
    "model.text.key_value_heads=1", "model.text.mlp_size=32", "model.pool_stride=1",
    "tracking.wandb=disabled", "tracking.console=false",
    "stages.*.data.global_batch_size=4", "stages.*.data.workers=0", "stages.*.save_every=2",
    "stages.*.optim.lr=2e-3", "stages.*.optim.min_lr=0", "stages.*.keep=2",
    "stages.*.epochs=null", "stages.*.trainable=all",
]  # fmt: skip


def small_overrides(packed: Path) -> list[str]:
    """Overrides of a small run of two stages, `align` then `realtime`, without an output folder."""
    return [
        "recipe=quickstart", *SMALL, "~stages.temporal", "~stages.sft",
        "~stages.realtime.data.sources.sft", f"data_root={packed / 'train'}",
        f"evaluate.source={packed / 'heldout' / 'realtime'}", f"evaluate.offline_source={packed / 'heldout' / 'sft'}",
        "stages.align.steps=3", "stages.realtime.steps=6",
    ]  # fmt: skip
