"""The model's numbers equal those of the public reference implementation (fp32). Never skipped, see conftest.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moss_train.checkpoint.verify import TOLERANCES, VerifyOptions, verify, verify_command
from moss_train.cli import main
from moss_train.errors import CheckpointError
from moss_train.parallel import groups

HERE = Path(__file__).parent
SET = {
    "config": str(HERE / "video_mllama_tiny.json"),
    "weights": str(HERE / "video_mllama_tiny.weights.safetensors"),
    "io": str(HERE / "video_mllama_tiny.io.safetensors"),
}
FIGURES = {f"{case}.{name}" for case in ("leading_text", "frame_first") for name in TOLERANCES}


@pytest.mark.parametrize("attention", ["segments", "dense"])
def test_equals_the_reference(attention):
    result = verify(VerifyOptions(**SET, attention=attention))
    assert result["ok"], result["failures"]
    assert set(result["figures"]) == FIGURES
    for name, deviation in result["figures"].items():
        assert deviation <= TOLERANCES[name.split(".")[1]], name


def test_without_the_leak_only_text_before_the_first_frame_differs():
    result = verify(VerifyOptions(**SET, reference_compat=False))
    assert result["ok"], result["failures"]
    assert set(result["figures"]) == FIGURES
    assert result["figures"]["leading_text.logits"] > 1e-2  # the leak is real: closing it shows
    assert result["figures"]["leading_text.pooled_features"] <= TOLERANCES["pooled_features"]
    for name, tolerance in TOLERANCES.items():
        assert result["figures"][f"frame_first.{name}"] <= tolerance


def test_a_changed_weight_fails(tmp_path, capsys):
    weights = load_file(SET["weights"])
    weights["vision_model.transformer.layers.0.mlp.fc1.weight"] *= 1.01
    save_file(weights, tmp_path / "weights.safetensors")
    options = SET | {"weights": str(tmp_path / "weights.safetensors")}
    assert verify_command(VerifyOptions(**options)) == 1
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert not line["ok"] and any("logits" in failure for failure in line["failures"])


def test_swapped_intermediate_maps_fail(tmp_path):
    """The projector's input channels are interleaved; joining the maps block by block must be noticed."""
    weights = load_file(SET["weights"])
    projector = weights["multi_modal_projector.weight"]
    width = projector.shape[1] // 3
    blockwise = projector[:, width:].unflatten(1, (width, 2)).transpose(1, 2).flatten(1)
    weights["multi_modal_projector.weight"] = torch.cat([projector[:, :width], blockwise], dim=1).contiguous()
    save_file(weights, tmp_path / "weights.safetensors")
    result = verify(VerifyOptions(**SET | {"weights": str(tmp_path / "weights.safetensors")}))
    assert any("projected_features" in failure for failure in result["failures"])


def test_missing_and_extra_parameters_are_all_named(tmp_path):
    weights = load_file(SET["weights"])
    del weights["language_model.lm_head.weight"], weights["vision_model.layernorm_pre.bias"]
    weights["language_model.model.layers.9.extra"] = torch.zeros(3)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError) as error:
        verify(VerifyOptions(**SET | {"weights": str(tmp_path / "weights.safetensors")}))
    for name in ("language_model.lm_head.weight", "vision_model.layernorm_pre.bias", "layers.9.extra [3]"):
        assert name in str(error.value)


@pytest.mark.parametrize("which", ["config", "weights", "io"])
def test_a_missing_file_is_one_clear_error(which, tmp_path, capsys):
    arguments = [f"{key}={value}" for key, value in (SET | {which: str(tmp_path / "absent")}).items()]
    assert main(["convert", "verify", *arguments]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("", [], "the whole should be an object, but is []"),
        ("config.x", 3, "sizes describe no model"),
        ("config.h", "64", "sizes describe no model"),
        ("config.nh", 0, "sizes describe no model"),
        ("config", None, "config should be an object, but is null"),
        ("rope.llama3", 1.5, "sizes describe no model"),
        ("cases", ["leading_text"], "cases should be an object"),
        ("cases.frame_first", 3, "frame_first should be an object"),
        ("cases.frame_first.loss_plain", "5.8", "frame_first.loss_plain should be a number"),
        ("cases.frame_first.grad_norms_of_silence_weighted_loss", 1.0, "should be an object"),
    ],
)
def test_a_malformed_description_is_one_clear_error(path, value, expected, tmp_path, capsys):
    reference = json.loads(Path(SET["config"]).read_text())
    *folders, last = path.split(".")
    place = reference
    for name in folders:
        place = place[name]
    place[last] = value
    file = tmp_path / "reference.json"
    file.write_text(json.dumps(reference if path else value))
    assert main(["convert", "verify", *(f"{k}={v}" for k, v in (SET | {"config": str(file)}).items())]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(file) in error and expected in error


@pytest.fixture(autouse=True, scope="module")
def process_groups():
    yield
    groups.shutdown()
