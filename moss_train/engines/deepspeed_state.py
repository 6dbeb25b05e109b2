"""What a process of a DeepSpeed engine holds of the model and optimizer state, as blocks of whole tensors: to save and
to load. Nothing is communicated, as in `megatron_state`."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from moss_train.engines.deepspeed_shards import Shards
from moss_train.engines.frames import is_of_encoder
from moss_train.engines.megatron_state import OPTIMIZER, Replicas, own_part, read_block
from moss_train.engines.optimizer_state import MAIN, HeldState
from moss_train.engines.pieces import Piece, Shape, TensorSource, blocks_of_run
from moss_train.engines.weights import NAMESPACE
from moss_train.model.video_model import VideoModel
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import is_split


class DeepSpeedState:
    """The tensors of one engine on this process."""

    def __init__(
        self,
        model: VideoModel,
        trained: Mapping[str, torch.nn.Parameter],
        shards: Shards,
        moments: Sequence[str],
        parallel: ParallelState,
    ):
        self._model, self._trained, self._shards = model, trained, shards
        self._moments, self._parallel = moments, parallel

    def owned(self) -> list[Piece]:
        """What this process must save. The processes' pieces together hold every element of every tensor once."""
        by_replicas: dict[Replicas, list[Piece]] = {}
        for name, parameter in self._model.named_parameters():
            trained = name in self._trained
            held = self._shards.held(parameter) if trained else self._shards.weight(parameter)
            sharded = self._shards.sharded if trained else self._shards.weights_sharded
            replicas = self._replicas(name, parameter, sharded and 0 not in self.whole_shape(parameter))
            for kind, tensor_name in self._saved_under(name):
                pieces = self._pieces(tensor_name, parameter, held, kind, constant=not trained)
                by_replicas.setdefault(replicas, []).extend(pieces)
        return [piece for replicas, pieces in by_replicas.items() for piece in own_part(pieces, replicas)]

    def load(self, source: TensorSource, optimizer: bool) -> None:
        """Copy this process's part of every weight, and of every moment if told to, out of `source`."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                self._load_weight(source, f"{NAMESPACE}/{name}", parameter)
                if name not in self._trained:
                    continue
                held = self._shards.held(parameter)
                for kind, tensor_name in self._saved_under(name):
                    if kind == MAIN or optimizer:
                        for piece in self._pieces(tensor_name, parameter, held, kind):
                            read_block(source, piece.name, piece.offsets, tuple(piece.tensor.shape), piece.tensor)
        self._shards.after_loading()

    def whole_shape(self, parameter: torch.nn.Parameter) -> Shape:
        """Of the parameter before it was split over tensor-parallel processes."""
        shape = list(self._shards.shape(parameter))
        if is_split(parameter):
            shape[parameter.partition_dim] *= self._parallel.tensor_ranks
        return tuple(shape)

    def _load_weight(self, source: TensorSource, name: str, parameter: torch.nn.Parameter) -> None:
        for piece in self._pieces(name, parameter, self._shards.weight(parameter), MAIN):
            read_block(source, name, piece.offsets, tuple(piece.tensor.shape), piece.tensor)
        if (gathered := self._shards.gathered(parameter)) is not None:
            read_block(source, name, self._begin(parameter), tuple(gathered.shape), gathered)

    def _saved_under(self, name: str) -> Iterator[tuple[str, str]]:
        """What is saved of a parameter: kind and canonical name."""
        yield MAIN, f"{NAMESPACE}/{name}"
        if name in self._trained:
            for moment in self._moments:
                yield moment, f"{OPTIMIZER}/{name}/{moment}"

    def _pieces(
        self, tensor_name: str, parameter: torch.nn.Parameter, held: HeldState, kind: str, constant: bool = False
    ) -> list[Piece]:
        whole, begin, pieces = self.whole_shape(parameter), self._begin(parameter), []
        if 0 in whole:
            dtype = parameter.dtype if constant else torch.float32
            return [Piece(tensor_name, whole, begin, torch.empty(whole, dtype=dtype), constant)]
        at = 0
        for inner, extent in self._runs(parameter, held):
            size = torch.Size(extent).numel()
            block = held.tensors[kind][at : at + size].view(extent)
            at += size
            where = tuple(outer + offset for outer, offset in zip(begin, inner, strict=True))
            pieces.append(Piece(tensor_name, whole, where, block, constant))
        return pieces

    def _runs(self, parameter: torch.nn.Parameter, held: HeldState) -> Iterator[tuple[Shape, Shape]]:
        return blocks_of_run(tuple(self._shards.shape(parameter)), held.start, held.end)

    def _begin(self, parameter: torch.nn.Parameter) -> Shape:
        """Where this process's part of a parameter begins in the whole one."""
        shape = self._shards.shape(parameter)
        offsets = [0] * len(shape)
        if is_split(parameter):
            offsets[parameter.partition_dim] = self._parallel.tensor_rank * shape[parameter.partition_dim]
        return tuple(offsets)

    def _replicas(self, name: str, parameter: torch.nn.Parameter, sharded: bool) -> Replicas:
        """Who else holds the same: over tensor-parallel processes what is not split, over the stages the encoder where
        all of them have it, over data and frame ranks what is not sharded over these."""
        state, axes = self._parallel, []
        if not sharded:
            axes.append(("data", state.data_frame_group.size(), state.data_frame_group.rank()))
        if is_of_encoder(name) and state.layout.sharding == "model_parallel":
            axes.append(("pipeline", state.pipeline_ranks, state.pipeline_rank))
        if not is_split(parameter):
            axes.append(("tensor", state.tensor_ranks, state.tensor_rank))
        return Replicas(tuple(axes))
