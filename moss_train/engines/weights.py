"""A model's weights under their canonical names, as engines save them and runs load them."""

from collections.abc import Mapping

import torch

from moss_train.model.video_model import VideoModel
from moss_train.parallel.slices import own_slice

NAMESPACE = "model"  #: of the weights among a checkpoint's tensors


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`model/<name>` → weight, not copied: what of the model this process holds."""
    # Megatron's layers put None under `…_extra_state` into their state.
    state = model.state_dict()
    return {f"{NAMESPACE}/{name}": tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


@torch.no_grad()
def load_whole_weights(model: VideoModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy into `model` its part of whole weights, named `model/<name>`; KeyError when one it holds is not there."""
    for name, parameter in model.named_parameters():
        parameter.copy_(own_slice(parameter, weights[f"{NAMESPACE}/{name}"], model.tensor_group))
