"""The model as one process of a layout holds it, with weights that do not depend on the layout."""

from collections.abc import Iterator

import torch

from moss_train.model import modules
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.layers import CrossLayer, SelfLayer
from moss_train.model.parts import part_of
from moss_train.model.projector import Projector
from moss_train.model.video_model import Embedding, VideoModel, initialise_vision, megatron_config
from moss_train.model.vision_tower import VisionTower
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import own_slice


def build_model(
    config: ModelConfig,
    state: ParallelState,
    dtype: torch.dtype = torch.float32,
    recompute: RecomputeConfig | None = None,
    seed: int | None = None,
    fp8: bool = False,
) -> VideoModel:
    """What process `state` holds of the model, on the CPU.

    seed: of fresh weights, the same in every layout; None leaves weights unset, for what is loaded right after.
    """
    alone = state.tensor_ranks == 1 and state.pipeline_ranks == 1
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
    )
    if seed is not None and not alone:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in fresh_weights(config, state.own_group, dtype, seed):
                if name in parameters:
                    parameters[name].copy_(own_slice(parameters[name], weight, state.tensor_group))
    return model


def whole_model(config: ModelConfig, state: ParallelState, dtype: torch.dtype = torch.float32) -> VideoModel:
    """The whole model on this process alone, weights unset; on the meta device inside `torch.device("meta")`."""
    return VideoModel(config, state.own_group, dtype, initialise=False)


def fresh_weights(
    config: ModelConfig, own_group: torch.distributed.ProcessGroup, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and whole tensor of every fresh weight, drawn in the order in which `VideoModel` draws them.

    One module exists at a time, so a process that holds a tenth of the model does not need room for all of it.
    """
    torch.manual_seed(seed)
    megatron, text = megatron_config(config, dtype), config.text
    tower = VisionTower(config.vision).to(dtype)
    projector = Projector(config.vision.feature_size, text.hidden_size, dtype=dtype)
    yield from _named("embedding", Embedding(config, megatron, own_group))
    for index in range(text.layers):
        layer = (CrossLayer if index in text.cross_layers else SelfLayer)(index, config, megatron, own_group)
        yield from _named(f"layers.{index}", layer)
    yield from _named("final_norm", modules.rms_norm(megatron, text.hidden_size))
    yield from _named("head", modules.output_linear(megatron, text.hidden_size, text.vocabulary_size, own_group))
    initialise_vision(tower, projector, config)
    yield from _named("vision_tower", tower)
    yield from _named("projector", projector)


def _named(prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter.detach()
