"""Transformer Engine's layers beside the local ones, with the same weights."""

import inspect

import fused_stubs
import numpy as np
import pytest
import torch
from errors_beside import assert_as_near
from megatron.core.transformer import TransformerConfig
from model_cases import pack, stream, tiny_config

from moss_train.model import modules
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel

SIZE_IN, SIZE_OUT = 256, 384


def signature(function) -> dict:
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD}


def test_the_stubs_have_the_real_signatures(te):
    assert signature(te.Linear.__init__) == signature(fused_stubs.Linear.__init__)
    assert signature(te.Linear.forward) == signature(fused_stubs.Linear.forward)
    stub, real = signature(fused_stubs.RMSNorm.__init__), signature(te.RMSNorm.__init__)
    operation = signature(te.ops.RMSNorm.__init__)
    assert {name: stub[name] for name in real} == real
    assert {name: operation[name] for name in stub.keys() - real} == {n: stub[n] for n in stub.keys() - real}


def megatron(precision: str, **changes) -> TransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": SIZE_IN,
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "init_method": lambda weight: torch.nn.init.normal_(weight, std=0.05),
        "output_layer_init_method": lambda weight: torch.nn.init.normal_(weight, std=0.05),
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**settings, **Precision.named(precision).megatron_options(), **changes})


def make(kind: str, config: TransformerConfig, group) -> torch.nn.Module:
    if kind == "norm":
        return modules.rms_norm(config, SIZE_IN)
    return {"column": modules.column_linear, "row": modules.row_linear}[kind](config, SIZE_IN, SIZE_OUT, group)


def results(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    grad_x, grad_weight = torch.autograd.grad((out * weights).sum(), (x, layer.weight))
    return {"out": out, "x": grad_x, "weight": grad_weight}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["column", "row", "norm"])
def test_layers(kind, precision, device, parallel_state, te):
    group = parallel_state.tensor_group
    fused = make(kind, megatron(precision), group).to(device)
    plain = make(kind, megatron(precision, transformer_impl="local"), group).to(device)
    exact = make(kind, megatron("fp32"), group).to(device)
    assert type(fused).__module__ != type(plain).__module__
    assert fused.state_dict().keys() == {"weight"}
    with torch.no_grad():
        fused.weight.mul_(torch.linspace(0.5, 1.5, SIZE_IN, device=device))
        plain.weight.copy_(fused.weight)
        exact.weight.copy_(fused.weight)
    x = torch.randn(48, 2, SIZE_IN, device=device, dtype=fused.weight.dtype)
    assert_as_near(results(fused, x), results(plain, x), results(exact, x.float()))


def test_model(device, parallel_state, te, monkeypatch):
    """Logits and every gradient of a tiny model in bfloat16."""
    rng = np.random.default_rng(4)
    batch = pack([[stream(rng, 3), stream(rng, 2)], [stream(rng, 4)]]).to(device)

    def build(dtype: torch.dtype) -> VideoModel:
        return VideoModel(tiny_config(), parallel_state.tensor_group, dtype).to(device)

    torch.manual_seed(0)
    fused = build(torch.bfloat16)
    monkeypatch.setattr(modules, "transformer_engine_problem", lambda: "switched off")
    plain, exact = build(torch.bfloat16), build(torch.float32)
    assert type(fused.final_norm) is not type(plain.final_norm)
    weights = dict(fused.named_parameters())
    with torch.no_grad():
        for model in (plain, exact):
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])

    def results(model: VideoModel) -> dict[str, torch.Tensor]:
        logits = model(batch)
        targets = torch.arange(logits.numel() // logits.shape[-1], device=device) % logits.shape[-1]
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets).backward()
        # A gradient that is small beside the others is held to their size.
        whole = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        out = {"logits": logits}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.float().norm() > 1e-3 * whole:
                out[name] = parameter.grad
        return out

    found, beside, truth = results(fused), results(plain), results(exact)
    common = found.keys() & beside.keys() & truth.keys()
    assert len(common) > 20
    assert_as_near(*({name: x[name] for name in common} for x in (found, beside, truth)))
