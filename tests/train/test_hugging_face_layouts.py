"""From a Hugging Face folder into the parts of a layout, through a step that changes nothing, and out again."""

from pathlib import Path

import pytest
import torch
from run_jobs import train
from safetensors.torch import load_file
from small_runs import SMALL

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint.store import latest, open_checkpoint
from moss_train.cli import main
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline

SIZES = ["model.text.key_value_heads=2", "model.text.layers=4", "model.text.cross_layers=[1,3]"]


@pytest.fixture(scope="module")
def ranks():
    """Forked processes."""
    with Ranks(4) as forked:
        yield forked


@pytest.fixture(scope="module")
def overrides(packed):
    """One stage of one step."""
    stages = ["~stages.align", "~stages.temporal", "~stages.sft", "stages.realtime.steps=1"]
    return ["recipe=quickstart", *SMALL, *SIZES, *stages, f"data_root={packed / 'train'}", "evaluate.source=null"]


@pytest.fixture(scope="module")
def published(overrides, tmp_path_factory):
    """Precision → a folder of a trained model."""
    folder = tmp_path_factory.mktemp("published")
    run = compose_run([*overrides, "stages.realtime.init=scratch", f"output_dir={folder / 'run'}"])
    assert run_pipeline(run) == 0
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        export(folder / "run", folder / precision, f"dtype={dtype}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def export(run, out, *options) -> None:
    assert main(["convert", "export", f"ckpt={run}", f"out={out}", "shard_bytes=100KB", *options]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (4, ["layout.tp=2", "layout.pp=2", "layout.sp=true"]),
        (4, ["layout.pp=2", "layout.vpp=2", "layout.zero=1"]),
        (2, ["layout.tp=2", "layout.frame_shard=tp", "layout.zero=1"]),
        (1, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_in_and_out_of_a_layout_is_bit_identical(overrides, published, ranks, tmp_path, processes, layout, precision):
    source, run = published / precision, tmp_path / "run"
    still = [f"precision={precision}", f"stages.realtime.init={source}", "stages.realtime.optim.lr=0"]
    arguments = [*overrides, *still, *layout, f"output_dir={run}"]
    assert ranks.run(processes, train, arguments) == [0] * processes
    saved = open_checkpoint(latest(run / "realtime" / "checkpoints"))
    assert saved.dtype("model/head.weight") == torch.float32  # the optimizer's own, exact beside 16 bits
    export(run, tmp_path / "exported")
    found, expected = tensors_of(tmp_path / "exported"), tensors_of(source)
    assert found.keys() == expected.keys()
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_a_checkpoint_of_many_slices_is_exported_like_one_of_whole_tensors(overrides, published, ranks, tmp_path):
    """What `published` exported from one process, imported, trained on four, equals what those four hold."""
    checkpoint = tmp_path / "imported"
    assert main(["convert", "import", f"source={published / 'fp32'}", f"out={checkpoint}"]) == 0
    run = tmp_path / "run"
    layout = ["layout.tp=2", "layout.pp=2"]
    assert (
        ranks.run(4, train, [*overrides, f"stages.realtime.init={checkpoint}", *layout, f"output_dir={run}"]) == [0] * 4
    )
    export(run, tmp_path / "exported", "dtype=stored")
    trained = open_checkpoint(latest(run / "realtime" / "checkpoints")).tensors("model/")
    found = tensors_of(tmp_path / "exported")
    assert torch.equal(found["language_model.lm_head.weight"], trained["model/head.weight"])
    embedding = torch.cat([trained["model/embedding.text.weight"], trained["model/embedding.extra"]])
    assert torch.equal(found["language_model.model.embed_tokens.weight"], embedding)
    assert len(found) == len(trained) - 1
