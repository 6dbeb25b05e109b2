"""The decision head: from the last hidden state at a frame's anchor to the logit of "speak now".

A linear layer of one output beside the language-model head, as Dispider's silent head. Every tensor-parallel process
holds all of it. With sequence parallelism each applies it to its share of the tokens, and the logits, four bytes a
token, are gathered: what follows is then computed alike on all of them, so that backwards each takes its share of the
gradient, and the head's own gradient is a part that must be summed (`partial_over_tensor_group`).

It starts from zeros: it then says "50 %" everywhere and moves nothing else at the first step, and it needs no random
number, so that a model draws the same other weights with it and without it.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import nn

PREFIX = "decision_head."  #: of its parameters' names


class DecisionHead(nn.Module):
    """Hidden states [T, R, H] to float32 logits [T, R]; with sequence parallelism from this process's share of T."""

    def __init__(self, megatron: TransformerConfig, width: int, group):
        super().__init__()
        dtype = megatron.params_dtype
        self._group = group if megatron.sequence_parallel else None
        self.weight = nn.Parameter(torch.empty(1, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, dtype=dtype))
        if megatron.perform_initialization:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
        if megatron.sequence_parallel:
            for parameter in self.parameters():
                parameter.partial_over_tensor_group = True

    def forward(self, x_TRH: torch.Tensor) -> torch.Tensor:
        logits_TR = F.linear(x_TRH, self.weight, self.bias)[..., 0].float()
        if self._group is None:
            return logits_TR
        return gather_from_sequence_parallel_region(logits_TR, tensor_parallel_output_grad=False, group=self._group)
