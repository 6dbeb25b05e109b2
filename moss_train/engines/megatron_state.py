"""What a process of a layout holds of the model and optimizer state, as blocks of whole tensors: to save and to load.

Nothing is communicated: who saves what several processes hold follows from their numbers alone, and each reads its own
blocks from a source.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer

from moss_train.engines import optimizer_state
from moss_train.engines.frames import is_of_encoder
from moss_train.engines.pieces import Piece, Shape, TensorSource, blocks_of_run
from moss_train.engines.weights import NAMESPACE
from moss_train.model.video_model import VideoModel
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import is_split, own_offsets, whole_shape

OPTIMIZER = "optimizer"  #: namespace of the moments among a checkpoint's tensors


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same blocks, in the same order, as this one."""

    axes: tuple[tuple[str, int, int], ...]  #: along which they differ: name, how many, and this one's number

    @property
    def count(self) -> int:
        """How many they are."""
        return math.prod(size for _, size, _ in self.axes)

    @property
    def own(self) -> int:
        """This one's number among them."""
        number = 0
        for _, size, rank in self.axes:
            number = number * size + rank
        return number


class MegatronState:
    """The tensors of one engine on this process."""

    def __init__(
        self,
        model: VideoModel,
        trained: Mapping[str, torch.nn.Parameter],
        optimizer: ChainedOptimizer,
        moments: Sequence[str],
        parallel: ParallelState,
    ):
        self._model, self._trained, self._optimizer = model, trained, optimizer
        self._moments, self._parallel = moments, parallel

    def owned(self) -> list[Piece]:
        """What this process must save. The processes' pieces together hold every element of every tensor once."""
        by_replicas: dict[Replicas, list[Piece]] = {}
        for name, parameter in self._model.named_parameters():
            for kind, tensor_name in self._saved_under(name):
                for piece, shared in self._held(tensor_name, name, parameter, kind):
                    by_replicas.setdefault(self._replicas(name, parameter, shared), []).append(piece)
        return [piece for replicas, pieces in by_replicas.items() for piece in own_part(pieces, replicas)]

    def load(self, source: TensorSource, optimizer: bool) -> None:
        """Copy this process's part of every weight, and of every moment if told to, out of `source`."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                read_block(source, f"{NAMESPACE}/{name}", *self._place(parameter), parameter)
                # A 16-bit parameter lost digits that its float32 original must keep.
                for kind, tensor_name in self._saved_under(name):
                    if kind is None or (kind != optimizer_state.MAIN and not optimizer):
                        continue
                    for piece, _ in self._held(tensor_name, name, parameter, kind):
                        if piece.tensor.data_ptr() != parameter.data_ptr():
                            read_block(source, piece.name, piece.offsets, tuple(piece.tensor.shape), piece.tensor)

    def _saved_under(self, name: str) -> Iterator[tuple[str | None, str]]:
        """What is saved of a parameter: kind (None: the parameter itself) and canonical name."""
        if name not in self._trained:
            yield None, f"{NAMESPACE}/{name}"
            return
        yield optimizer_state.MAIN, f"{NAMESPACE}/{name}"
        for moment in self._moments:
            yield moment, f"{OPTIMIZER}/{name}/{moment}"

    def _held(
        self, tensor_name: str, name: str, parameter: torch.nn.Parameter, kind: str | None
    ) -> Iterator[tuple[Piece, bool]]:
        """The blocks of one tensor that are here, and whether each process that holds the same part of the parameter
        holds the same blocks."""
        offsets, shape = self._place(parameter)
        whole = whole_shape(parameter, self._parallel.tensor_group)
        if kind is None or not parameter.numel():
            kept = parameter.detach() if kind in (None, optimizer_state.MAIN) else parameter.detach().float()
            yield Piece(tensor_name, whole, offsets, kept, constant=kind is None), True
            return
        held = optimizer_state.held_state(self._optimizer, parameter)
        if kind not in held.tensors:
            return
        flat = held.tensors[kind].detach().view(-1)
        shared = not optimizer_state.is_distributed(self._optimizer)
        begin = 0
        for inner, extent in blocks_of_run(shape, held.start, held.end):
            size = torch.Size(extent).numel()
            block = flat[begin : begin + size].view(extent)
            begin += size
            where = tuple(outer + offset for outer, offset in zip(offsets, inner, strict=True))
            yield Piece(tensor_name, whole, where, block), shared

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Shape, Shape]:
        """Where this process's part of a parameter begins in the whole one, and its shape."""
        return own_offsets(parameter, self._parallel.tensor_group), tuple(parameter.shape)

    def _replicas(self, name: str, parameter: torch.nn.Parameter, over_data: bool) -> Replicas:
        """Who else holds the same: over tensor-parallel processes what is not split, over the stages the encoder where
        all of them have it, over data and frame ranks what is not sharded over these."""
        state = self._parallel
        axes = []
        if over_data:
            axes.append(("data", state.data_frame_group.size(), state.data_frame_group.rank()))
        if is_of_encoder(name) and state.layout.sharding == "model_parallel":
            axes.append(("pipeline", state.pipeline_ranks, state.pipeline_rank))
        if not is_split(parameter):
            axes.append(("tensor", state.tensor_ranks, state.tensor_rank))
        return Replicas(tuple(axes))


def own_part(pieces: Sequence[Piece], replicas: Replicas) -> list[Piece]:
    """Of pieces that several processes hold, in the same order, those that this one saves: each gets a run of them, of
    about equal bytes."""
    total = sum(piece.tensor.nbytes for piece in pieces)
    chosen, before = [], 0
    for piece in pieces:
        # Whose part the piece's middle lies in; all decide alike, so each piece has one owner.
        middle = before + piece.tensor.nbytes / 2
        before += piece.tensor.nbytes
        owner = min(int(middle * replicas.count / total), replicas.count - 1) if total else 0
        if owner == replicas.own:
            chosen.append(piece)
    return chosen


def read_block(source: TensorSource, name: str, offsets: Shape, shape: Shape, target: torch.Tensor) -> None:
    """Copy a block of `source` into `target`, which has its shape; rounded where `target` is less precise."""
    target.copy_(source.read(name, offsets, shape))
