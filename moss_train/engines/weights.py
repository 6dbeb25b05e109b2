"""A model's weights under their canonical names, as engines save them and runs load them."""

import torch

NAMESPACE = "model"  #: of the weights among a checkpoint's tensors


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`model/<name>` → weight, not copied."""
    # Megatron's layers put None under `…_extra_state` into their state.
    state = model.state_dict()
    return {f"{NAMESPACE}/{name}": tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
