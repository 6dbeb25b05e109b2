"""Packed streams through FlashAttention's interface: the same numbers as the segments' plan, and zero for padding."""

import sys

import fused_stubs
import numpy as np
import pytest
import torch
from model_cases import pack, stream

from moss_train.model import flash, visibility
from moss_train.model.attention import SegmentAttention

HEADS, KEY_VALUE_HEADS, WIDTH = 6, 2, 8
CPU = torch.device("cpu")


def cases(rng: np.random.Generator) -> dict:
    one, two, three = (stream(rng, frames, leading) for frames, leading in ((2, 3), (1, 6), (4, 1)))
    return {
        "one row, one stream": pack([[one]]),
        "one row, packed": pack([[one, two, three]]),
        "one row, padded": pack([[one, two]], padding=5),
        "rows without padding": pack([[one, two], [one, two]]),
        "rows of unequal length": pack([[one, two], [three], [two, three, one]], padding=2),
    }


@pytest.fixture
def qkv():
    def make(batch, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)
        rows, tokens = batch.segments_RT.shape
        sizes = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
        return [
            torch.randn(tokens, rows, heads, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
            for heads in sizes
        ]

    return make


def with_gradients(function, inputs, member_TR1):
    """Output and input gradients, where only the tokens of streams count."""
    out = function(*inputs) * member_TR1
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("name", list(cases(np.random.default_rng(0))))
def test_same_as_segments(name, qkv, monkeypatch):
    fused_stubs.install_flash_attention(monkeypatch)
    batch = cases(np.random.default_rng(0))[name]
    streams = flash.lay_out_streams(batch.segments_RT, CPU)
    segments = SegmentAttention(visibility.plan_self_attention(batch, CPU), None)
    member_TR1 = (batch.segments_RT >= 0).T[..., None].double()
    inputs = qkv(batch)

    fused = with_gradients(lambda *x: flash.packed_causal_attention(*x, streams), inputs, member_TR1)
    planned = with_gradients(lambda *x: segments.self_attention(0, *x), inputs, member_TR1)
    for actual, expected in zip(fused, planned, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert fused[0].abs().sum() > 0


def test_padding_gets_exactly_zero(qkv, monkeypatch):
    fused_stubs.install_flash_attention(monkeypatch)
    batch = cases(np.random.default_rng(0))["rows of unequal length"]
    out_TRH = flash.packed_causal_attention(*qkv(batch), flash.lay_out_streams(batch.segments_RT, CPU))
    padding_TR = (batch.segments_RT < 0).T
    assert padding_TR.any() and (out_TRH[padding_TR] == 0).all()
    assert (out_TRH[~padding_TR] != 0).any(-1).all()


def test_layout_of_packed_rows():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, -1, -1, -1]], dtype=torch.int32)
    streams = flash.lay_out_streams(segments, CPU)
    assert streams.cu_seqlens.tolist() == [0, 2, 5, 6, 8]
    assert streams.cu_seqlens.dtype == torch.int32
    assert streams.longest == 3 and not streams.in_order
    assert streams.token_of_place_S.tolist() == [0, 2, 4, 6, 8, 1, 3, 5]
    assert streams.place_of_token.tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 8, 8, 8]


def test_rows_of_padding_alone(qkv, monkeypatch):
    fused_stubs.install_flash_attention(monkeypatch)
    batch = cases(np.random.default_rng(0))["one row, one stream"]
    streams = flash.lay_out_streams(torch.full_like(batch.segments_RT, -1), CPU)
    inputs = [x.requires_grad_() for x in qkv(batch)]
    mixed = flash.packed_causal_attention(*inputs, streams)
    assert (mixed == 0).all()
    mixed.sum().backward()  # the weights behind the inputs must take part in gradient sums all the same
    assert all((x.grad == 0).all() for x in inputs)


def test_the_stub_is_strict(qkv):
    batch = cases(np.random.default_rng(0))["one row, one stream"]
    packed = [x.flatten(0, 1) for x in qkv(batch)]
    streams = flash.lay_out_streams(batch.segments_RT, CPU)
    seqlens, longest = (streams.cu_seqlens,) * 2, (streams.longest,) * 2
    fused_stubs.flash_attn_varlen_func(*packed, *seqlens, *longest, causal=True)
    with pytest.raises(TypeError, match="is_causal"):
        fused_stubs.flash_attn_varlen_func(*packed, *seqlens, *longest, is_causal=True)
    with pytest.raises(TypeError, match="max_seqlen_k"):
        fused_stubs.flash_attn_varlen_func(*packed, *seqlens, longest[0], causal=True)
    with pytest.raises(AssertionError):
        fused_stubs.flash_attn_varlen_func(*packed, *(x.long() for x in seqlens), *longest, causal=True)


def test_where_it_is_refused(monkeypatch):
    assert "not float32" in flash.flash_attention_problem(torch.float32, torch.device("cuda", 0), 128)
    assert "not cpu" in flash.flash_attention_problem(torch.bfloat16, CPU, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in flash.flash_attention_problem(torch.float16, torch.device("cuda", 0), 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "256" in flash.flash_attention_problem(torch.float16, torch.device("cuda", 0), 260)
    fused_stubs.install_flash_attention(monkeypatch)
    assert flash.flash_attention_available(torch.bfloat16, torch.device("cuda", 0), 128)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "not installed" in flash.flash_attention_problem(torch.bfloat16, torch.device("cuda", 0), 128)
