"""Transformer Engine's layers in the places of ours, checked without it: megatron-core's wrappers over a strict stub.

Without Transformer Engine megatron-core's classes are mocks that take anything, so a test against those shows nothing.
"""

import inspect

import fused_stubs
import numpy as np
import pytest
import torch
from megatron.core.extensions import transformer_engine as installed
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from model_cases import pack, stream, tiny_config

from moss_train.model import modules
from moss_train.model.config import ModelConfig
from moss_train.model.layers import CrossLayer, SelfLayer
from moss_train.model.normalization import RMSNorm
from moss_train.model.video_model import Embedding, VideoModel

SIZE_IN, SIZE_OUT = 12, 20
EPSILON = 3e-4
FUSED_COLUMN, FUSED_ROW = "TEColumnParallelLinear", "TERowParallelLinear"
LINEAR = {"column": modules.column_linear, "row": modules.row_linear, "frame": modules.unsummed_linear}


class Group:
    """A process group as far as layers look at it before they run."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


def megatron(**changes) -> TransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": SIZE_IN,
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": EPSILON,
        "init_method": lambda weight: torch.nn.init.normal_(weight, std=0.5),
        "output_layer_init_method": lambda weight: torch.nn.init.normal_(weight, std=0.25),
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**settings, **changes})


@pytest.fixture
def wrappers(monkeypatch):
    return fused_stubs.install_transformer_engine(monkeypatch)


@pytest.fixture
def calls(wrappers, monkeypatch) -> list[tuple[str, dict]]:
    """Which wrapper was called with what, arguments bound to the names in the wrapper's signature."""
    made = []

    def recording(name, wrapper):
        signature = inspect.signature(wrapper.__new__ if name == "TENorm" else wrapper.__init__)

        def call(*args, **kwargs):
            bound = dict(signature.bind(None, *args, **kwargs).arguments)
            del bound["cls" if name == "TENorm" else "self"]
            made.append((name, bound))
            return wrapper(*args, **kwargs)

        return call

    for name, wrapper in wrappers.items():
        monkeypatch.setattr(installed, name, recording(name, wrapper))
    return made


def test_column_linear(wrappers, calls):
    config, group = megatron(), Group(2)
    layer = modules.column_linear(config, SIZE_IN, SIZE_OUT, group)
    assert isinstance(layer, wrappers["TEColumnParallelLinear"])
    assert calls == [
        (
            "TEColumnParallelLinear",
            {
                "input_size": SIZE_IN,
                "output_size": SIZE_OUT,
                "config": config,
                "init_method": config.init_method,
                "gather_output": False,
                "bias": False,
                "skip_bias_add": False,
                "is_expert": False,
                "tp_group": group,
            },
        )
    ]


def test_row_linear(wrappers, calls):
    config, group = megatron(), Group(2)
    layer = modules.row_linear(config, SIZE_IN, SIZE_OUT, group)
    assert isinstance(layer, wrappers["TERowParallelLinear"])
    assert calls == [
        (
            "TERowParallelLinear",
            {
                "input_size": SIZE_IN,
                "output_size": SIZE_OUT,
                "config": config,
                "init_method": config.output_layer_init_method,
                "bias": False,
                "input_is_parallel": True,
                "skip_bias_add": False,
                "is_expert": False,
                "tp_group": group,
            },
        )
    ]


def test_rms_norm(wrappers, calls):
    config = megatron()
    norm = modules.rms_norm(config, SIZE_IN)
    assert isinstance(norm, fused_stubs.RMSNorm)
    assert calls == [("TENorm", {"config": config, "hidden_size": SIZE_IN, "eps": EPSILON})]
    assert norm.eps == EPSILON


def test_frames_and_heads_stay_local(calls):
    layer = modules.unsummed_linear(megatron(), SIZE_IN, SIZE_OUT, Group(2))
    assert type(layer) is ColumnParallelLinear
    assert layer.disable_grad_reduce and not layer.sequence_parallel
    assert type(modules.head_norm(megatron(), 4)) is RMSNorm
    assert calls == []


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_what_reaches_transformer_engine(kind, sequence_parallel, wrappers, parallel_state):
    group = Group(2)
    config = megatron(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    told = LINEAR[kind](config, SIZE_IN, SIZE_OUT, group).told
    expected = {
        "in_features": SIZE_IN, "out_features": SIZE_OUT, "parallel_mode": kind, "tp_group": group, "tp_size": 2,
        "sequence_parallel": sequence_parallel, "bias": False, "return_bias": False, "params_dtype": torch.bfloat16,
        "fuse_wgrad_accumulation": False, "device": "cpu",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    norm = modules.rms_norm(config, SIZE_IN)
    assert norm.told["sequence_parallel"] == sequence_parallel
    assert norm.told["params_dtype"] == torch.bfloat16


@pytest.mark.parametrize("ranks, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", ["column", "row", "frame", "norm"])
def test_parameters_as_the_local_ones(kind, sequence_parallel, ranks, wrappers, parallel_state):
    def parameters(impl: str) -> dict:
        changes = {"tensor_model_parallel_size": ranks, "sequence_parallel": sequence_parallel}
        config = megatron(transformer_impl=impl, **changes)
        if kind == "norm":
            layer = modules.rms_norm(config, SIZE_IN)
        else:
            layer = LINEAR[kind](config, SIZE_IN, SIZE_OUT, Group(ranks))
        weights = {name: value for name, value in layer.state_dict().items() if isinstance(value, torch.Tensor)}
        parameters = dict(layer.named_parameters())
        assert weights.keys() == parameters.keys() == {"weight"}
        attributes = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce")
        return {
            name: (tuple(p.shape), p.dtype, *(getattr(p, attribute, None) for attribute in attributes))
            for name, p in parameters.items()
        }

    assert parameters("transformer_engine") == parameters("local")


@pytest.mark.parametrize("kind", ["column", "row"])
def test_numbers_and_states_change_hands(kind, wrappers, parallel_state):
    fused = LINEAR[kind](megatron(), SIZE_IN, SIZE_OUT, parallel_state.tensor_group)
    local = LINEAR[kind](megatron(transformer_impl="local"), SIZE_IN, SIZE_OUT, parallel_state.tensor_group)
    assert type(fused) is not type(local)
    assert fused.state_dict().keys() == {"weight"}
    fused.load_state_dict(local.state_dict(), strict=False)
    local.load_state_dict(fused.state_dict())
    assert torch.equal(fused.weight, local.weight) and fused.weight.std() > 0.1

    x = torch.randn(5, 2, SIZE_IN, dtype=torch.bfloat16)
    (out, bias), (expected, local_bias) = fused(x), local(x)
    assert torch.equal(out, expected) and bias is None and local_bias is None


def test_norm_rounds_once(wrappers):
    fused, local = modules.rms_norm(megatron(), 64), modules.rms_norm(megatron(transformer_impl="local"), 64)
    fused.load_state_dict(local.state_dict())
    x = torch.randn(5, 2, 64, dtype=torch.bfloat16)
    assert fused.state_dict().keys() == {"weight"}
    torch.testing.assert_close(fused(x), local(x), rtol=2**-7, atol=0)


def test_layer_norm_is_refused(wrappers):
    with pytest.raises(ValueError, match="normalization='LayerNorm'"):
        modules.rms_norm(megatron(normalization="LayerNorm"), SIZE_IN)


@pytest.mark.parametrize("changes", [{"transformer_impl": "local"}, {"params_dtype": torch.float32, "bf16": False}])
def test_local_when_told_or_in_float32(changes, calls):
    config = megatron(**changes)
    assert type(modules.column_linear(config, SIZE_IN, SIZE_OUT, Group(1))) is ColumnParallelLinear
    assert type(modules.row_linear(config, SIZE_IN, SIZE_OUT, Group(1))) is RowParallelLinear
    assert type(modules.rms_norm(config, SIZE_IN)) is RMSNorm
    assert calls == []


def test_when_it_is_usable(monkeypatch):
    monkeypatch.setattr(installed, "HAVE_TE", False)
    assert "not installed" in modules.transformer_engine_problem()
    monkeypatch.setattr(installed, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in modules.transformer_engine_problem()
    assert modules.transformer_impl(torch.bfloat16) == "local"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert modules.transformer_engine_problem() is None
    assert modules.transformer_impl(torch.bfloat16) == modules.transformer_impl(torch.float16) == "transformer_engine"
    assert modules.transformer_impl(torch.float32) == "local"


@pytest.mark.parametrize(
    "function, right, wrong, refused",
    [
        ("column_linear", "is_expert=False, ", "", "is_expert"),
        ("column_linear", "skip_bias_add=False", "skip_bias=False", "skip_bias"),
        ("column_linear", "tp_group=group", "tp_group=group, disable_grad_reduce=True", "disable_grad_reduce"),
        ("row_linear", "input_is_parallel=True, ", "", "input_is_parallel"),
        ("row_linear", "tp_group=group", "tp_group=group, gather_output=False", "gather_output"),
        ("rms_norm", "eps=megatron", "epsilon=megatron", "epsilon"),
    ],
)
def test_the_stub_is_strict(function, right, wrong, refused, wrappers):
    """Mistaken calls, made from the real ones, are refused."""
    source = inspect.getsource(getattr(modules, function))
    head, fused = source.split("if _fused(megatron):")
    assert right in fused
    namespace = dict(vars(modules))
    exec(head + "if _fused(megatron):" + fused.replace(right, wrong, 1), namespace)
    sizes = (SIZE_IN,) if function == "rms_norm" else (SIZE_IN, SIZE_OUT, Group(1))
    with pytest.raises(TypeError, match=refused):
        namespace[function](megatron(), *sizes)


def expected_slots(config: ModelConfig) -> dict[str, str]:
    """Class of every module of the decoder that has parameters of its own."""
    slots = {"embedding.text": "VocabParallelEmbedding", "final_norm": "RMSNorm of the engine", "head": "column"}
    for index in range(config.text.layers):
        layer = f"layers.{index}."
        frames = index in config.text.cross_layers
        slots |= {layer + norm: "RMSNorm of the engine" for norm in ("attention_norm", "mlp_norm")}
        slots |= {layer + name: FUSED_COLUMN for name in ("attention.query", "mlp.gate", "mlp.up")}
        slots |= {layer + name: FUSED_ROW for name in ("attention.output", "mlp.down")}
        slots |= {f"{layer}attention.{name}": "column" if frames else FUSED_COLUMN for name in ("key", "value")}
        if frames:
            slots |= {f"{layer}attention.{name}_norm": "RMSNorm" for name in ("query", "key")}
    return slots


def test_every_slot_of_the_model(wrappers, parallel_state):
    classes = {
        FUSED_COLUMN: wrappers[FUSED_COLUMN],
        FUSED_ROW: wrappers[FUSED_ROW],
        "RMSNorm of the engine": fused_stubs.RMSNorm,
        "RMSNorm": RMSNorm,
        "column": ColumnParallelLinear,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    }
    config = tiny_config()
    model = VideoModel(config, parallel_state.tensor_group, torch.bfloat16)
    containers = (VideoModel, SelfLayer, CrossLayer, Embedding)
    found = {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(("vision_tower", "projector"))
        and not isinstance(module, containers)
        and list(module.parameters(recurse=False))
    }
    expected = expected_slots(config)
    assert found.keys() == expected.keys()
    for name, kind in expected.items():
        assert isinstance(found[name], classes[kind]), f"{name} is {type(found[name])}, not {kind}"
    for name, module in found.items():
        if hasattr(module, "told"):
            assert module.told.get("tp_group", parallel_state.tensor_group) is parallel_state.tensor_group, name
            assert module.told["sequence_parallel"] is False, name


def test_the_model_computes_the_same(wrappers, parallel_state, monkeypatch):
    """Same names, shapes and numbers in bfloat16, but for where norms round."""
    batch = pack([[stream(np.random.default_rng(1), 3), stream(np.random.default_rng(2), 1)]])

    def build() -> VideoModel:
        return VideoModel(tiny_config(), parallel_state.tensor_group, torch.bfloat16).eval()

    torch.manual_seed(5)
    fused = build()
    monkeypatch.setattr(modules, "transformer_engine_problem", lambda: "switched off")
    local = build()
    weights = {name: tensor for name, tensor in local.state_dict().items() if isinstance(tensor, torch.Tensor)}
    assert {n: t.shape for n, t in fused.named_parameters()} == {n: t.shape for n, t in local.named_parameters()}
    assert weights.keys() == {n for n, t in fused.state_dict().items() if isinstance(t, torch.Tensor)}
    local.load_state_dict(fused.state_dict(), strict=False)

    with torch.no_grad():
        out, expected = fused(batch).float(), local(batch).float()
    assert (out - expected).norm() < 2e-2 * expected.norm()
    assert expected.std() > 0.1
