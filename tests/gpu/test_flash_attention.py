"""FlashAttention's kernel beside the segments' plan."""

import inspect

import fused_stubs
import numpy as np
import pytest
import torch
from errors_beside import assert_as_near
from model_cases import pack, stream

from moss_train.model import flash, visibility
from moss_train.model.attention import SegmentAttention


def test_the_stub_has_the_real_signature(flash_attn):
    real, stub = (inspect.signature(f.flash_attn_varlen_func) for f in (flash_attn, fused_stubs))
    assert [(p.name, p.default) for p in real.parameters.values()] == [
        (p.name, p.default) for p in stub.parameters.values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("padding", [0, 37])
def test_same_as_segments(dtype, rows, padding, device, flash_attn):
    """Outputs and gradients, grouped heads, streams of 30 to 400 tokens."""
    rng = np.random.default_rng(rows)
    batch = pack([[stream(rng, frames) for frames in (120, 9, 41)] for _ in range(rows)], padding)
    heads, key_value_heads, width = 8, 2, 128
    assert flash.flash_attention_problem(dtype, device, width) is None
    streams = flash.lay_out_streams(batch.segments_RT, device)
    segments = SegmentAttention(visibility.plan_self_attention(batch, device), None)
    member_TR1 = (batch.segments_RT >= 0).T[..., None].to(device)
    tokens = batch.segments_RT.shape[1]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(tokens, rows, n, width, generator=generator).to(device, dtype)
        for n in (heads, key_value_heads, key_value_heads)
    ]
    weights = torch.randn(tokens, rows, heads * width, generator=generator).to(device, dtype)

    def results(attend, dtype) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = attend(*leaves) * member_TR1
        gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)
        return {"out": out, **dict(zip(("q", "k", "v"), gradients, strict=True))}

    def planned(*x):
        return segments.self_attention(0, *x)

    fused = results(lambda *x: flash.packed_causal_attention(*x, streams), dtype)
    assert (fused["out"][~member_TR1.expand_as(fused["out"])] == 0).all()
    assert_as_near(fused, results(planned, dtype), results(planned, torch.float32))
