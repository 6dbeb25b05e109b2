"""Transformer Engine and FlashAttention without a GPU: their signatures, computed by torch.

A call that they would refuse is refused here: no signature takes what the real one does not. `tests/gpu` compares the
signatures with the installed packages. megatron-core's wrappers are not copied: their source is run over the stub.
"""

import ast
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as installed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn


class _WithExtraState(nn.Module):
    """Transformer Engine's modules put a uint8 tensor into the state, empty when they did not run in FP8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state.numel() == 0


class Linear(_WithExtraState):
    """`transformer_engine.pytorch.Linear` of 2.9 to 2.11, on groups of one process."""

    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False,
        ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None,
    ):  # fmt: skip
        super().__init__()
        self.told = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        assert parallel_mode in (None, "column", "row")
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias = bias
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=params_dtype))
        init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, 1 if parallel_mode == "row" else 0, 1)
        assert not bias, "the model has no biases"
        self.bias = torch.empty(0)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        assert self.tp_size == 1
        return F.linear(inp, self.weight)


class RMSNorm(_WithExtraState):
    """`transformer_engine.pytorch.RMSNorm` of 2.9 to 2.11, with the keywords of the operation that it is made of."""

    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, *, device=None, dtype=None, sm_margin=0,
    ):  # fmt: skip
        super().__init__()
        self.told = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        assert (normalized_shape is None) != (hidden_size is None)
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size or normalized_shape, device=device, dtype=params_dtype))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, **_):
        raise AssertionError("the model has no LayerNorm in its decoder")


WRAPPERS = ("TENorm", "TELinear", "TEColumnParallelLinear", "TERowParallelLinear")
_HELPERS = ("_get_extra_te_kwargs",)


def megatron_wrappers() -> dict[str, type]:
    """megatron-core's own wrapper classes, by name, made of its installed source over the stub above."""
    source = Path(installed.__file__).read_text(encoding="utf-8")
    wanted = [node for node in ast.parse(source).body if getattr(node, "name", None) in WRAPPERS + _HELPERS]
    assert len(wanted) == len(WRAPPERS + _HELPERS)
    pytorch = types.SimpleNamespace(Linear=Linear, RMSNorm=RMSNorm, LayerNorm=LayerNorm)
    namespace = {
        **vars(installed),
        "te": types.SimpleNamespace(pytorch=pytorch),
        "HAVE_TE": True,
        "is_te_min_version": lambda version, check_equality=True: True,
    }
    exec(compile(ast.Module(wanted, type_ignores=[]), installed.__file__, "exec"), namespace)
    return {name: namespace[name] for name in WRAPPERS}


def install_transformer_engine(monkeypatch) -> dict[str, type]:
    """Let `model.modules` find a usable Transformer Engine; the wrapper classes, by name."""
    from moss_train.model import modules

    wrappers = megatron_wrappers()
    for name, wrapper in wrappers.items():
        monkeypatch.setattr(installed, name, wrapper)
    monkeypatch.setattr(modules, "transformer_engine_problem", lambda: None)
    return wrappers


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """`flash_attn.flash_attn_varlen_func` of 2.7 and 2.8 for self-attention: [S, A, D] and [S, B, D] to [S, A, D]."""
    assert q.dim() == k.dim() == v.dim() == 3 and q.shape[0] == k.shape[0] == v.shape[0] and k.shape == v.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[1] % k.shape[1] == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == q.shape[0]
    lengths = cu_seqlens_q.diff()
    assert len(lengths) > 0 and (lengths > 0).all()
    assert max_seqlen_q == max_seqlen_k == lengths.max()
    assert (dropout_p, softmax_scale, window_size, softcap) == (0.0, None, (-1, -1), 0.0)
    assert alibi_slopes is None and block_table is None and not return_attn_probs
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for begin, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
        scores = torch.einsum("iad,jad->aij", q[begin:end], k[begin:end]) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        out.append(torch.einsum("aij,jad->iad", scores.softmax(-1), v[begin:end]))
    return torch.cat(out)


def install_flash_attention(monkeypatch) -> None:
    """Let `import flash_attn` find the stub."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
