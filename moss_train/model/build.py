"""The model as one process of a layout holds it, with weights that do not depend on the layout."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from moss_train.model import modules
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.decision_head import DecisionHead
from moss_train.model.layers import CrossLayer, SelfLayer
from moss_train.model.parts import part_of
from moss_train.model.projector import Projector
from moss_train.model.video_model import Embedding, VideoModel, initialise_vision, megatron_config
from moss_train.model.vision_tower import VisionTower
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import own_slice


class ParameterStore(Protocol):
    """Keeps the parameters of a model from its construction on, where no process may ever hold all of them."""

    def take(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Take over parameters whose weights are not set yet; what memory they have can be freed."""

    def fill(self, parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        """Set the weight of a parameter that was taken over; `weight` has the shape that it had."""


def build_model(
    config: ModelConfig,
    state: ParallelState,
    dtype: torch.dtype = torch.float32,
    recompute: RecomputeConfig | None = None,
    seed: int | None = None,
    fp8: bool = False,
    store: ParameterStore | None = None,
) -> VideoModel:
    """What process `state` holds of the model, on the CPU.

    seed: of fresh weights, the same in every layout; None leaves weights unset, for what is loaded right after.
    store: takes over each part of the model before the next one is built; None leaves parameters as they are.
    """
    alone = state.tensor_ranks == 1 and state.pipeline_ranks == 1 and store is None
    if seed is not None:
        torch.manual_seed(seed)
    model = VideoModel(
        config,
        state.tensor_group,
        dtype,
        part_of(config, state.layout, state.pipeline_rank),
        state.frame_group,
        state.layout.sp,
        recompute,
        initialise=alone and seed is not None,
        fp8=fp8,
        finished=None if store is None else lambda part: store.take(part.parameters()),
    )
    if seed is not None and not alone:
        parameters = dict(model.named_parameters())
        fill = torch.Tensor.copy_ if store is None else store.fill
        with torch.no_grad():
            for name, weight in fresh_weights(config, state.own_group, dtype, seed):
                if name in parameters:
                    fill(parameters[name], own_slice(parameters[name], weight, state.tensor_group))
                del weight  # or a matrix of this module would be there beside the next module
    return model


def whole_model(config: ModelConfig, state: ParallelState, dtype: torch.dtype = torch.float32) -> VideoModel:
    """The whole model on this process alone, weights unset; on the meta device inside `torch.device("meta")`."""
    return VideoModel(config, state.own_group, dtype, initialise=False)


def fresh_weights(
    config: ModelConfig, own_group: torch.distributed.ProcessGroup, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and whole tensor of every fresh weight, drawn in the order in which `VideoModel` draws them.

    One module exists at a time, so a process that holds a tenth of the model does not need room for all of it: none is
    bound to a name here, which would keep it beside the next one.
    """
    torch.manual_seed(seed)
    megatron, text = megatron_config(config, dtype), config.text
    _vision(config, dtype)  # `VideoModel` makes it first, which draws numbers, and its weights last
    yield from _named("embedding", Embedding(config, megatron, own_group))
    for index in range(text.layers):
        kind = CrossLayer if index in text.cross_layers else SelfLayer
        yield from _named(f"layers.{index}", kind(index, config, megatron, own_group))
    yield from _named("final_norm", modules.rms_norm(megatron, text.hidden_size))
    yield from _named("head", modules.unsummed_linear(megatron, text.hidden_size, text.vocabulary_size, own_group))
    if config.decision_head:
        yield from _named("decision_head", DecisionHead(megatron, text.hidden_size, own_group))
    drawn_so_far = torch.get_rng_state()
    tower, projector = _vision(config, dtype)
    torch.set_rng_state(drawn_so_far)
    initialise_vision(tower, projector, config)
    yield from _named("vision_tower", tower)
    yield from _named("projector", projector)


def _vision(config: ModelConfig, dtype: torch.dtype) -> tuple[VisionTower, Projector]:
    tower = VisionTower(config.vision).to(dtype)
    return tower, Projector(config.vision.feature_size, config.text.hidden_size, dtype=dtype)


def _named(prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter.detach()
