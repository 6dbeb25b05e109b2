"""A model's weights under their canonical names, as engines save them and runs load them."""

import torch

from moss_train.engines.pieces import TensorSource
from moss_train.model.video_model import VideoModel
from moss_train.parallel.slices import own_offsets

NAMESPACE = "model"  #: of the weights among a checkpoint's tensors


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`model/<name>` → weight, not copied: what of the model this process holds."""
    # Megatron's layers put None under `…_extra_state` into their state.
    state = model.state_dict()
    return {f"{NAMESPACE}/{name}": tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


@torch.no_grad()
def load_weights_into(model: VideoModel, source: TensorSource) -> None:
    """Copy into `model` its part of the weights in `source`, named `model/<name>`."""
    group = model.tensor_group
    for name, parameter in model.named_parameters():
        block = source.read(f"{NAMESPACE}/{name}", own_offsets(parameter, group), tuple(parameter.shape))
        parameter.copy_(block)
