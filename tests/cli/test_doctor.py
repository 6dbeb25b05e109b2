"""`moss-train doctor`: versions, devices, and which implementations the model takes."""

import fused_stubs
import pytest
import torch

from moss_train.doctor import DoctorOptions, doctor_command


def printed(capsys) -> dict[str, str]:
    assert doctor_command(DoctorOptions()) == 0
    return {line[:19].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as doctor looks at it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = printed(capsys)
    assert lines["GPUs"].startswith("none")
    assert lines["layers"] == "local: there is no CUDA device"
    assert lines["self-attention"] == "torch's: there is no CUDA device"
    assert lines["fp8"] == "no: there is no CUDA device"


def test_a_gpu_without_its_packages(gpu, capsys):
    lines = printed(capsys)
    assert lines["GPUs"] == "A GPU"
    assert lines["layers"] == "local: Transformer Engine is not installed (extra `gpu`)"
    assert lines["self-attention"].startswith("torch's: FlashAttention is not installed")
    assert "the device has 8.6 and Transformer Engine is not installed" in lines["fp8"]


def test_a_gpu_with_everything(gpu, capsys, monkeypatch):
    fused_stubs.install_transformer_engine(monkeypatch)
    fused_stubs.install_flash_attention(monkeypatch)
    monkeypatch.setattr("moss_train.model.precision.is_te_min_version", lambda version: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    lines = printed(capsys)
    assert lines["layers"] == "Transformer Engine's"
    assert lines["self-attention"].startswith("FlashAttention's")
    assert lines["fp8"] == "yes"
