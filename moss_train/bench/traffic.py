"""Bytes that one process sends, by kind: counted where torch hands them to the network.

Every collective of torch.distributed, whoever calls it and under whatever name, passes torch's dispatcher as an
operator `c10d::…`. `Traffic` stands there. So nothing is missed that megatron-core bound to a name of its own at
import, that runs in a backward pass or that is sent in one batch.

Bytes are what a ring algorithm sends from each process of a group of n, on average over the group, whatever algorithm
the backend really takes. With s the size of the whole tensor:

| operation | bytes |
| --- | --- |
| all_reduce | 2 (n − 1) / n · s |
| all_gather, reduce_scatter, all_to_all, broadcast, reduce | (n − 1) / n · s |
| send | s, at the sender |
| gather | s of its own part, at every process but the root |
| scatter | (n − 1) / n · s at the root, s over all parts |
| barrier, and whatever is received | 0 |

A kind says who asks, as found on the call stack: see `KINDS`.
"""

import collections
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Module (or its beginning) → kind. The innermost caller that is listed decides, by its longest entry.
KINDS: dict[str, str] = {
    "megatron.core.tensor_parallel": "tensor",
    "megatron.core.tensor_parallel.cross_entropy": "loss",
    "megatron.core.pipeline_parallel": "pipeline",
    "megatron.core.distributed": "data",
    "megatron.core.optimizer": "control",
    "deepspeed": "data",
    "moss_train.parallel.frame_gather": "frames",
    "moss_train.parallel": "control",
    "moss_train.model.frame_parallel": "cross_attention",
    "moss_train.objectives": "loss",
    "moss_train.engines.gradients": "shared_gradients",
    "moss_train.engines": "control",
}
OTHER = "other"
#: Stands between a caller and the network only because memory is measured at the same time.
_OBSERVER = "moss_train.engines.memory"

#: Operator → operation and the argument that holds the whole of what the group works on.
_COLLECTIVES: dict[str, tuple[str, str]] = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "allgather_": ("all_gather", "output_tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
}
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan", "wait_tensor"}


def ring_bytes(operation: str, size: float, ranks: int) -> float:
    """Bytes one process sends, as in the table above; `size` in bytes. gather: at a process that is not the root;
    scatter: at the root. A group of one sends nothing."""
    if ranks == 1:
        return 0.0
    if operation in ("send", "gather"):
        return float(size)
    rounds = 2 if operation == "all_reduce" else 1
    return rounds * (ranks - 1) * size / ranks


class Traffic(TorchDispatchMode):
    """Counts what this process sends while it is entered; entered again, it goes on counting.

    `bytes` and `calls` are keyed by `<kind>.<operation>`, such as `tensor.all_reduce`.
    """

    def __init__(self):
        super().__init__()
        self.bytes: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        name = function._schema.name.split("::")[1]
        if name in _SILENT:
            return
        if function.namespace != "c10d" or name not in _COLLECTIVES:
            raise RuntimeError(
                f"torch.ops.{function.namespace}.{name}: bench/traffic.py knows no size for this operator"
            )
        operation, payload = _COLLECTIVES[name]
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(given["process_group"])
        silent_at_root = {"gather": True, "scatter": False}.get(operation)
        if group.size() == 1 or silent_at_root == (group.rank() == given.get("root_rank")):
            return
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(given[payload]) if _is_tensor(leaf))
        key = f"{_kind(sys._getframe(1))}.{operation}"
        self.bytes[key] += ring_bytes(operation, size, group.size())
        self.calls[key] += 1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _kind(frame: FrameType | None) -> str:
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        parts = module.split(".")
        for length in range(len(parts) if module != _OBSERVER else 0, 0, -1):
            kind = KINDS.get(".".join(parts[:length]))
            if kind is not None:
                return kind
        frame = frame.f_back
    return OTHER
