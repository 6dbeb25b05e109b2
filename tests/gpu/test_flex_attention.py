"""FlexAttention's kernel over block masks beside the segments' plan: windows, sinks, packing, rows without frames."""

import numpy as np
import pytest
import torch
from errors_beside import assert_as_near
from model_cases import pack, stream

from moss_train.model import visibility
from moss_train.model.attention import SegmentAttention
from moss_train.model.flex import FlexAttention

TOKENS_PER_FRAME = 101


@pytest.mark.parametrize("options", [{}, {"window": 8}, {"window": 8, "sinks": 2}])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_same_as_segments(options, kind, device):
    """bfloat16: outputs and gradients, grouped heads, ragged blocks, streams of up to 90 frames."""
    rng = np.random.default_rng(0)
    rows = [[stream(rng, 60, **options), stream(rng, 30, **options)], [stream(rng, 0, leading=40)]]
    batch = pack(rows, padding=7)
    heads, key_value_heads, width = 8, 2, 128
    flex = FlexAttention(batch, False, TOKENS_PER_FRAME, device)
    segments = SegmentAttention(
        visibility.plan_self_attention(batch, device), visibility.plan_cross_attention(batch, False, device)
    )
    tokens, count = batch.segments_RT.shape[1], batch.frame_positions_RF.numel()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    keys = (tokens, batch.rows) if kind == "self" else (count, TOKENS_PER_FRAME)
    inputs = [drawn(tokens, batch.rows, heads, width), *(drawn(*keys, key_value_heads, width) for _ in range(2))]
    weights = drawn(tokens, batch.rows, heads * width)
    member_TR1 = (batch.segments_RT >= 0).T[..., None].to(device)

    def results(backend, dtype) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = getattr(backend, f"{kind}_attention")(0, *leaves) * member_TR1
        gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)
        return {"out": out, **dict(zip(("q", "k", "v"), gradients, strict=True))}

    fused = results(flex, torch.bfloat16)
    if kind == "cross":
        blind = ~visibility.sees_frames(batch).to(device).expand_as(fused["out"])
        assert (fused["out"][blind] == 0).all()
    assert_as_near(fused, results(segments, torch.bfloat16), results(segments, torch.float32))
