"""Folders that are not what they should be: every offender is named, nothing outside is read, nothing half is left."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from hugging_face_cases import edit_json, save_mllama, tensors_of
from safetensors.torch import save_file

from moss_train.checkpoint.hugging_face import folder as folder_module
from moss_train.checkpoint.hugging_face.sizes import read_sizes
from moss_train.checkpoint.hugging_face.source import SafetensorsFiles
from moss_train.cli import main
from moss_train.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    return save_mllama(tmp_path / "source")


def convert(direction: str, capsys, **options: object) -> str:
    """What is said on standard error by a conversion that is refused."""
    assert main(["convert", direction, *(f"{name}={value}" for name, value in options.items())]) == 2
    return capsys.readouterr().err


def first_file(folder):
    return min(folder.glob("model-*.safetensors"))


def test_every_offender_is_listed_at_once(source, tmp_path, capsys):
    tensors = tensors_of(source)
    for file in source.glob("model*"):
        file.unlink()
    del tensors["language_model.lm_head.weight"], tensors["vision_model.layernorm_pre.bias"]
    tensors["language_model.model.layers.9.extra"] = torch.zeros(3)
    tensors["multi_modal_projector.weight"] = torch.zeros(48, 97)
    tensors["language_model.model.embed_tokens.weight"] = torch.zeros(1024, 48)  # without the 8 extra rows
    save_file(tensors, source / "model.safetensors")
    told = convert("import", capsys, source=source, out=tmp_path / "out")
    assert "2 tensors are missing, 1 unexpected, 2 of another shape" in told
    for line in (
        "missing language_model.lm_head.weight [1024, 48]",
        "missing vision_model.layernorm_pre.bias [32]",
        "unexpected language_model.model.layers.9.extra [3]",
        "multi_modal_projector.weight has shape [48, 97], the model needs [48, 96]",
        "language_model.model.embed_tokens.weight has shape [1024, 48], the model needs [1032, 48]",
    ):
        assert line in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/b.safetensors", ".hidden"])
def test_an_index_that_leaves_the_folder_is_refused(name, source, tmp_path, capsys):
    first_file(source).rename(tmp_path / "stolen.safetensors")
    content = json.loads((source / INDEX).read_text())
    content["weight_map"]["language_model.lm_head.weight"] = name
    (source / INDEX).write_text(json.dumps(content))
    told = convert("import", capsys, source=source, out=tmp_path / "out")
    assert INDEX in told and repr(name) in told and "none of it is read" in told


def test_missing_files_are_all_named(source, tmp_path, capsys):
    missing = sorted(source.glob("model-*.safetensors"))[1:3]
    for file in missing:
        file.unlink()
    told = convert("import", capsys, source=source, out=tmp_path / "out")
    assert all(file.name in told for file in missing) and "2 of the" in told


def test_an_index_that_does_not_describe_its_files_is_refused(source):
    content = json.loads((source / INDEX).read_text())
    content["weight_map"]["nowhere"] = first_file(source).name
    (source / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{first_file(source).name} lacks nowhere"):
        SafetensorsFiles(source)
    (source / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        SafetensorsFiles(source)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(damage, source, tmp_path, capsys):
    file = first_file(source)
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-1], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    told = convert("import", capsys, source=source, out=tmp_path / "out")
    assert str(file) in told and "not a readable safetensors file" in told
    assert not (tmp_path / "out").exists()


def test_one_tensor_in_two_files_or_under_two_names_is_refused(source, tmp_path, capsys):
    (source / INDEX).unlink()
    save_file({"language_model.lm_head.weight": torch.zeros(1)}, source / "model-again.safetensors")
    assert "hold language_model.lm_head.weight" in convert("import", capsys, source=source, out=tmp_path / "out")
    save_file({"lm_head.weight": torch.zeros(1)}, source / "model-again.safetensors")
    assert "one tensor under two names" in convert("import", capsys, source=source, out=tmp_path / "out")


def test_quantised_weights_are_refused(source, tmp_path, capsys):
    quantised = {name: tensor.to(torch.int8) for name, tensor in tensors_of(source).items()}
    for file in source.glob("model*"):
        file.unlink()
    save_file(quantised, source / "model.safetensors")
    told = convert("import", capsys, source=source, out=tmp_path / "out")
    assert "is I8" in told and "not quantised" in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen3_vl"}, "model_type is 'qwen3_vl'; what can be read is Llama-3.2-Vision"),
        ({"text_config__vocab_size": "many"}, "text_config.vocab_size is 'many', should be a whole number"),
        (
            {"text_config__num_attention_heads": 0},
            "text_config.num_attention_heads is 0, should be a whole number of at",
        ),
        ({"vision_config__max_num_tiles": 10**9}, "vision_config.max_num_tiles is 1000000000, should be at most 64"),
        ({"vision_config__supported_aspect_ratios": 8}, "vision_config.supported_aspect_ratios is 8, should be a list"),
        ({"architectures": "Mllama"}, "architectures is 'Mllama', should be a list"),
        ({"text_config__tie_word_embeddings": True}, "text_config.tie_word_embeddings is True"),
        ({"text_config__rope_parameters": {"rope_type": "yarn"}}, "rope types default and llama3"),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ({"vision_config__merge_mode": ["average"]}, "vision_config.merge_mode is ['average']"),
        ({"vision_config__merge_mode": "bilinear"}, "vision_config.merge_mode is 'bilinear'"),
        ({"vision_config__merge_mode": "average", "vision_config__merge_size": 3}, "model.pool_stride=3"),
        ({"vision_config__vision_output_dim": 97}, "the maps have 96 channels together"),
        ({"vision_config__intermediate_layers_indices": [9]}, "model.vision.intermediate_layers=[9]"),
        ({"vision_config": None}, "vision_config is None, should be an object"),
    ],
)
def test_a_config_that_cannot_be_names_file_and_field(changes, expected, source):
    edit_json(source / "config.json", **changes)
    with pytest.raises(CheckpointError) as error:
        read_sizes(source)
    assert str(source / "config.json") in str(error.value) and expected in str(error.value)


def test_what_does_not_go_together_is_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    told = convert("import", capsys, source=source, out=out, model="tiny")
    assert "model.vision.image_size is 56, config.json says 28" in told
    assert "leave model out" in told
    assert "has 1024 rows" in convert("import", capsys, source=source, out=out, **{"tokenizer.vocabulary_size": 1030})
    (source / "tokenizer.json").unlink()
    assert "add tokenizer.path=" in convert("import", capsys, source=source, out=out)
    assert "no folder with safetensors files" in convert("import", capsys, source=tmp_path / "nowhere", out=out)
    assert not out.exists()


def test_nothing_is_overwritten(source, tmp_path, capsys):
    assert main(["convert", "import", f"source={source}", f"out={tmp_path / 'checkpoint'}"]) == 0
    assert "exists already" in convert("import", capsys, source=source, out=tmp_path / "checkpoint")
    assert "exists already" in convert("export", capsys, ckpt=tmp_path / "checkpoint", out=source)
    for options, expected in (
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"shard_bytes": "5 apples"}, "shard_bytes=5 apples: give a size such as 5GB"),
        ({"like": tmp_path / "nowhere"}, "config.json"),
    ):
        told = convert("export", capsys, ckpt=tmp_path / "checkpoint", out=tmp_path / "exported", **options)
        assert expected in told
    (tmp_path / "exported").mkdir()  # an empty folder is as good as none
    assert main(["convert", "export", f"ckpt={tmp_path / 'checkpoint'}", f"out={tmp_path / 'exported'}"]) == 0


def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    assert main(["convert", "import", f"source={source}", f"out={tmp_path / 'checkpoint'}"]) == 0

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_safetensors", full)
    told = convert("export", capsys, ckpt=tmp_path / "checkpoint", out=tmp_path / "exported")
    assert "No space left on device" in told and "nothing is left" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "source"]


_KILLED = """
import os, signal, sys
from moss_train.checkpoint.hugging_face import folder
from moss_train.cli import main
write = folder.write_safetensors
def stop_at_the_third(path, *arguments, **options):
    if path.name.startswith("model-00003"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *arguments, **options)
folder.write_safetensors = stop_at_the_third
main(sys.argv[1:])
"""


def test_a_killed_export_leaves_nothing_that_looks_whole(source, tmp_path):
    assert main(["convert", "import", f"source={source}", f"out={tmp_path / 'checkpoint'}"]) == 0
    command = [
        "convert",
        "export",
        f"ckpt={tmp_path / 'checkpoint'}",
        f"out={tmp_path / 'exported'}",
        "shard_bytes=50KB",
    ]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "exported").exists() and (tmp_path / ".tmp-exported").is_dir()
    assert main(command) == 0
    assert not (tmp_path / ".tmp-exported").exists()
    assert tensors_of(tmp_path / "exported").keys() == tensors_of(source).keys()
