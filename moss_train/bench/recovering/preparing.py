"""The run that is killed: rendered clips, a model of a few thousand parameters, AdamW, two stages, a save every two
steps."""

import shutil
from pathlib import Path

from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render

FIRST, LAST = "align", "realtime"  #: the stages
STAGES = (FIRST, LAST)
FIRST_STEPS = 3
SAVE_EVERY = 2
KEEP = 2
_CLIPS = {"align": 8, "temporal": 0, "sft": 0, "realtime": 12, "heldout": 0}

_SMALL = [
    "model.vision.hidden_size=16", "model.vision.local_layers=1", "model.vision.intermediate_layers=[0]",
    "model.vision.attention_heads=2", "model.vision.mlp_size=32", "model.vision.image_size=28",
    "model.text.hidden_size=16", "model.text.layers=2", "model.text.cross_layers=[1]", "model.text.attention_heads=2",
    "model.text.key_value_heads=2", "model.text.mlp_size=32", "model.pool_stride=1",
    "tracking.wandb=disabled", "tracking.console=false", "tracking.samples=true", "evaluate.source=null",
    "~stages.temporal", "~stages.sft", "~stages.realtime.data.sources.sft", "stages.*.trainable=all",
    "stages.*.epochs=null",
    "stages.*.data.global_batch_size=4", "stages.*.data.micro_batch_rows=1", "stages.*.data.workers=0",
    "stages.*.optim.name=adamw", "stages.*.optim.lr=2e-3", "stages.*.optim.min_lr=0", "stages.*.log_every=1",
    "stages.*.compiler.jitter_probability=0.5",
]  # fmt: skip


def prepared_data(folder: Path) -> Path:
    """Packed `align` and `realtime` below `folder`, made where an earlier call did not."""
    packed, clips = folder / "packed", folder / "clips"
    if all((packed / stage / "index.arrow").is_file() for stage in STAGES):
        return packed
    shutil.rmtree(packed, ignore_errors=True)
    shutil.rmtree(clips, ignore_errors=True)
    render(RenderOptions(out=str(clips), workers=1, **_CLIPS))
    for stage in STAGES:
        pack(clips / "train" / stage, packed / stage)
    shutil.rmtree(clips)
    return packed


def run_overrides(packed: Path, output: Path, steps: int, seed: int) -> list[str]:
    """What `moss-train train` is given; `steps` of the last stage."""
    return [
        "recipe=quickstart", *_SMALL, f"data_root={packed}", f"output_dir={output}", f"seed={seed}", "resume=auto",
        f"stages.*.save_every={SAVE_EVERY}", f"stages.*.keep={KEEP}", f"stages.{FIRST}.steps={FIRST_STEPS}",
        f"stages.{LAST}.steps={steps}",
    ]  # fmt: skip
