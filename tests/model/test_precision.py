"""Precisions: their dtypes, what megatron-core is told, and where fp8 is refused."""

import contextlib

import fused_stubs
import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.transformer import TransformerConfig
from model_cases import tiny_config

from moss_train.errors import ConfigError
from moss_train.model import modules, precision
from moss_train.model.config import TextConfig
from moss_train.model.precision import PRECISIONS, Precision, fp8_context

CUDA = torch.device("cuda", 0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def megatron(name: str) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, **Precision.named(name).megatron_options()
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_what_megatron_is_told(name):
    named = Precision.named(name)
    assert (named.name, named.dtype, named.fp8) == (name, DTYPES[name], name == "fp8")
    assert Precision.of(named.dtype, named.fp8) == named
    config = megatron(name)
    assert config.params_dtype == config.pipeline_dtype == DTYPES[name]
    assert (config.bf16, config.fp16) == (name in ("bf16", "fp8"), name == "fp16")
    assert config.transformer_impl == "local"  # there is no Transformer Engine
    assert (config.fp8, config.fp8_param) == ("hybrid" if name == "fp8" else None, False)
    if name == "fp8":
        assert config.fp8_recipe == "tensorwise"
        assert config.disable_parameter_transpose_cache


@pytest.mark.parametrize("name, impl", [("fp32", "local"), *((n, "transformer_engine") for n in PRECISIONS[1:])])
def test_transformer_engine_is_for_narrow_formats(name, impl, monkeypatch):
    monkeypatch.setattr(modules, "transformer_engine_problem", lambda: None)
    assert megatron(name).transformer_impl == impl


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"precision='bf8': legal values are fp32, bf16, fp16, fp8"):
        Precision.named("bf8")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_everything_else_runs_anywhere(name):
    Precision.named(name).check_supported(torch.device("cpu"))
    Precision.named(name).check_sizes(tiny_config(), tensor_ranks=2)


def test_fp8_says_all_that_is_missing(monkeypatch):
    fp8 = Precision.named("fp8")
    with pytest.raises(ConfigError, match="precision=fp8: needs .*8.9.*device is cpu and .*not installed.*bf16"):
        fp8.check_supported(torch.device("cpu"))

    fused_stubs.install_transformer_engine(monkeypatch)
    monkeypatch.setattr(precision, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"but the device has 8\.6; use"):
        fp8.check_supported(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.check_supported(CUDA)
    monkeypatch.setattr(precision, "is_te_min_version", lambda version: False)
    with pytest.raises(ConfigError, match="but Transformer Engine is older; use"):
        fp8.check_supported(CUDA)


def test_fp8_needs_sides_of_sixteen():
    fp8 = Precision.named("fp8")
    sizes = {"hidden_size": 64, "attention_heads": 4, "key_value_heads": 2, "mlp_size": 96}
    fp8.check_sizes(tiny_config(text=TextConfig(**sizes)), tensor_ranks=2)
    for tensor_ranks, changes, field in [
        (1, {"mlp_size": 72}, "text.mlp_size=72"),
        (2, {"mlp_size": 48}, "text.mlp_size=48"),
        (8, {}, "text.hidden_size=64"),
        (2, {"key_value_heads": 1}, "text.key_value_heads=1 of width 16"),
    ]:
        with pytest.raises(ConfigError, match=f"model.{field}.*multiple of 16 × {tensor_ranks}"):
            fp8.check_sizes(tiny_config(text=TextConfig(**(sizes | changes))), tensor_ranks)


@pytest.mark.parametrize(
    "name, ranks, sequence_parallel, multiple",
    [("bf16", 4, False, 1), ("bf16", 4, True, 4), ("fp8", 4, False, 16), ("fp8", 4, True, 64), ("fp8", 1, False, 16)],
)
def test_token_multiple(name, ranks, sequence_parallel, multiple):
    assert Precision.named(name).token_multiple(ranks, sequence_parallel) == multiple


def test_context(monkeypatch):
    inside = contextlib.nullcontext("fp8")
    monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config: inside)
    for name in ("fp32", "bf16", "fp16"):
        assert fp8_context(megatron(name)) is not inside
    # megatron-core returns a context that does nothing when there is no Transformer Engine
    with pytest.raises(ConfigError, match="precision=fp8: Transformer Engine is not installed"):
        fp8_context(megatron("fp8"))
    monkeypatch.setattr(modules, "transformer_engine_problem", lambda: None)
    assert fp8_context(megatron("fp8")) is inside
    assert fp8_context(megatron("fp8"), training=False) is not inside
