"""What is saved comes back, whatever does not fit is listed, and only complete directories count."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from moss_train.checkpoint import files
from moss_train.checkpoint.store import checkpoint_shapes, latest, load_checkpoint, save_checkpoint, verify
from moss_train.errors import CheckpointError

STATE = {"loader": {"epoch": 1, "step": 7, "fingerprint": "abc"}, "engine": {"step": 100}}
PROVENANCE = {"config": {"seed": 1, "name": "läuft"}, "git": None, "versions": {"torch": "2"}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "model/matrix": shared,
        "model/tied": shared,
        "model/transposed": torch.randn(5, 7, generator=generator).T,
        "model/row_of_a_matrix": torch.randn(3, 4, generator=generator)[1],
        "model/scalar": torch.tensor(1.5),
        "model/empty": torch.zeros(0, 3),
        "model/half": torch.randn(3, generator=generator).bfloat16(),
        "optimizer/matrix/exp_avg": torch.randn(4, 3, generator=generator).double(),
        "random/0/torch": torch.arange(9, dtype=torch.uint8),
        "random/0/numpy": torch.tensor([2**40, -1]),
        "random/0/flag": torch.tensor([True, False]),
    }


def save(directory, step: int = 100, seed: int = 0, **options):
    return save_checkpoint(directory, step, tensors(seed), STATE, PROVENANCE, **options)


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


@pytest.mark.parametrize("file_bytes", [1, 64, 2**30])
def test_everything_comes_back(tmp_path, file_bytes):
    path = save(tmp_path / "deep" / "checkpoints", file_bytes=file_bytes)
    assert path.name == "step_00000100"
    number = len(list(path.glob("tensors-*.safetensors")))
    assert number == {1: len(tensors()), 2**30: 1}.get(file_bytes, number) and number >= 1
    read = load_checkpoint(path)
    assert_same(read.tensors, tensors())
    assert (read.step, read.state, read.provenance, read.path) == (100, STATE, PROVENANCE, path)
    assert checkpoint_shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def test_no_tensor_at_all_is_a_checkpoint_too(tmp_path):
    assert load_checkpoint(save_checkpoint(tmp_path, 1, {}, {}, {})).tensors == {}


def test_only_some_namespaces(tmp_path):
    read = load_checkpoint(save(tmp_path), only=("model",))
    assert_same(read.tensors, {name: t for name, t in tensors().items() if name.startswith("model/")})


def test_every_misfit_is_listed_at_once(tmp_path):
    path = save(tmp_path)
    expect = {name: tuple(tensor.shape) for name, tensor in tensors().items() if name.startswith("model/")}
    load_checkpoint(path, expect)  # other namespaces are not compared
    del expect["model/half"]
    expect |= {"model/matrix": (4, 4), "model/new": (2,), "model/newer": ()}
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path, expect)
    for line in (
        "missing model/new [2]",
        "missing model/newer []",
        "unexpected model/half [3]",
        "model/matrix has shape [4, 3], the model needs [4, 4]",
    ):
        assert line in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 5


def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    for state in ({"x": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"state\.json"):
            save_checkpoint(tmp_path, 1, tensors(), state, PROVENANCE)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        save_checkpoint(tmp_path, 1, tensors(), STATE, {"config": {"x": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


def test_latest_follows_the_pointer(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    first = save(tmp_path, 1)
    second = save(tmp_path, 20)
    assert latest(tmp_path) == second
    (tmp_path / "latest").write_text("step_00000001\n")
    assert latest(tmp_path) == first
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == second


@pytest.mark.parametrize("content", ["", "step_00000999\n", "../elsewhere\n", "step_0000000\x00\n", "\xff"])
def test_a_damaged_pointer_is_refused(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="latest"):
        latest(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, seed=0)
    path = save(tmp_path, 1, seed=1)
    assert_same(load_checkpoint(path).tensors, tensors(1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_tensors_in_several_slices_are_put_together(tmp_path):
    path = save(tmp_path)
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    save_file({"a": whole[:, :2].contiguous()}, path / "tensors-10000.safetensors")
    save_file({"b": whole[:3, 2:].contiguous(), "c": whole[3:, 2:].contiguous()}, path / "tensors-10001.safetensors")
    slices = [
        {"file": "tensors-10001.safetensors", "key": "c", "offsets": [3, 2], "shape": [1, 4]},
        {"file": "tensors-10000.safetensors", "key": "a", "offsets": [0, 0], "shape": [4, 2]},
        {"file": "tensors-10001.safetensors", "key": "b", "offsets": [0, 2], "shape": [3, 4]},
    ]
    rewrite_index(path, lambda index: index.update({"model/w": entry(slices, [4, 6])}))
    assert torch.equal(load_checkpoint(path).tensors["model/w"], whole)


def entry(slices, shape, dtype="float32"):
    return {"shape": shape, "dtype": dtype, "slices": slices}


def rewrite_index(path, change) -> None:
    """Change the index and renew the manifest, as a malicious or faulty writer would."""
    content = json.loads((path / "index.json").read_text())
    change(content["tensors"])
    (path / "index.json").write_text(json.dumps(content))
    step = json.loads((path / "manifest.json").read_text())["step"]
    (path / "manifest.json").unlink()
    files.write_manifest(path, step)


def piece(**changes):
    whole = {"file": "tensors-00000-00000.safetensors", "key": "model/matrix", "offsets": [0, 0], "shape": [4, 3]}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def test_the_index_that_the_next_test_spoils_is_good(tmp_path):
    path = save(tmp_path)
    rewrite_index(path, lambda index: index.update({"model/matrix": entry([piece()], [4, 3])}))
    assert_same(load_checkpoint(path).tensors, tensors())


@pytest.mark.parametrize(
    "bad",
    [
        entry([piece(file="../outside.safetensors")], [4, 3]),
        entry([piece(file="/etc/passwd")], [4, 3]),
        entry([piece(file="manifest.json")], [4, 3]),
        entry([piece(key="nothing")], [4, 3]),
        entry([piece(key=None)], [4, 3]),
        entry([piece(key=7)], [4, 3]),
        entry([piece(offsets=[-1, 0])], [4, 3]),
        entry([piece(offsets=[0.0, 0])], [4, 3]),
        entry([piece(offsets=[False, 0])], [4, 3]),
        entry([piece(shape=[4.0, 3])], [4.0, 3]),
        entry([piece(shape=[10**30, 3])], [10**30, 3]),
        entry([piece(offsets=[0, 0, 0], shape=[4, 3, 1])], [4, 3, 1]),
        entry([piece(offsets=[1, 0])], [4, 3]),
        entry([piece(offsets=[0])], [4, 3]),
        entry([piece(shape=[3, 4])], [3, 4]),
        entry([piece()], [5, 3]),
        entry([], [4, 3]),
        entry([piece()], [4, 3], dtype="float16"),
        entry([piece()], [4, 3], dtype="object"),
        {"shape": [4, 3]},
        None,
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path, bad):
    path = save(tmp_path)
    rewrite_index(path, lambda index: index.update({"model/matrix": bad}))
    with pytest.raises(CheckpointError, match="model/matrix|malformed|nothing"):
        load_checkpoint(path)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    path = save(tmp_path)
    outside = tmp_path / "outside"
    os.rename(path / "state.json", outside)
    (path / "state.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(path)


def test_a_manifest_that_names_another_directory_is_refused(tmp_path):
    path = save(tmp_path)
    (tmp_path / "outside").write_text("x")
    listed = json.loads((path / "manifest.json").read_text())["files"]
    listed["../outside"] = {"bytes": 1, files.CHECKSUM: files._checksum(tmp_path / "outside")}
    (path / "manifest.json").write_bytes(files._manifest_bytes(100, listed))
    with pytest.raises(CheckpointError, match="not the name of a file in this directory"):
        verify(path)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step_00000003")


@pytest.mark.parametrize("name", ["index.json", "state.json", "provenance.json"])
@pytest.mark.parametrize("content", ["[]", "[" * 100_000], ids=["list", "deep"])
def test_a_file_of_another_form_is_refused_though_the_manifest_agrees(tmp_path, name, content):
    path = save(tmp_path)
    (path / name).write_text(content)
    (path / "manifest.json").unlink()
    files.write_manifest(path, 100)
    with pytest.raises(CheckpointError, match=name):
        verify(path)


def test_an_unfinished_save_is_never_loaded(tmp_path):
    path = save(tmp_path)
    partial = tmp_path / ".tmp-step_00000200"
    os.rename(path, partial)
    with pytest.raises(CheckpointError, match="never loaded"):
        load_checkpoint(partial)
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) is None
