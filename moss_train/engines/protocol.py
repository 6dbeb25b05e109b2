"""What the training loop may ask of an engine; it knows no more about Megatron or any other than this."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moss_train.data.batch import Batch
from moss_train.engines.config import OptimConfig
from moss_train.engines.pieces import Piece, Shape, TensorSource
from moss_train.model.build import ParameterStore
from moss_train.objectives.figures import LossFigures
from moss_train.objectives.streaming_loss import StreamingLoss


@dataclass
class StepOutput(LossFigures):
    """What one optimizer step did. Every rank holds the same values."""

    grad_norm: float  #: norm of the whole gradient before clipping, measured with clipping off too
    lr: dict[str, float]  #: learning rate of this step by trained parameter group
    skipped: bool  #: neither weights nor optimizer state changed: loss or gradient not finite, or loss above the limit
    overflowed: bool = False  #: skipped because float16 gradients overflowed, and the loss scale still has room to fall


@dataclass
class EngineState:
    """Everything a run needs to go on. Tensors have canonical names, metadata is JSON.

    Names: `model/<parameter>`, `optimizer/<parameter>/exp_avg`, `optimizer/<parameter>/exp_avg_sq`, where
    `<parameter>` is the name in the whole model's `named_parameters()`. Weights of trained parameters are the float32
    ones that the optimizer updates; those of frozen parameters have the model's precision. The tensors may be the
    engine's own, not copies.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]


class Engine(Protocol):
    """Trains one model. Process groups exist before `setup`; an engine makes none."""

    step: int  #: training steps taken, skipped ones included; the place in the learning-rate schedule
    skipped_steps: int  #: how many of them were skipped
    #: Set it, on every process, before a step after which `gradients` is wanted: some engines free them in it.
    keep_gradients: bool

    def parameter_store(self) -> ParameterStore | None:
        """What `model.build.build_model` must be given to build the model that `setup` gets; None where each process
        holds whole parameters."""

    def setup(
        self,
        model: torch.nn.Module,
        trainable: set[str],
        optim: OptimConfig,
        objective: StreamingLoss,
        total_steps: int,
    ) -> None:
        """Take over `model`, which is what this process holds of it: freeze all but the parameters named in
        `trainable`, build the optimizer. `trainable` names parameters of the whole model.

        ConfigError when a name or a group does not exist, or nothing would be trained.
        """

    def train_step(self, microbatches: Sequence[Batch], loss_limit: float | None = None) -> StepOutput:
        """One optimizer step on this rank's microbatches of the global batch (at least one, on any device).

        A loss above `loss_limit`, which is the same on every rank, counts as one that is not finite.
        """

    def eval_step(self, microbatches: Sequence[Batch]) -> LossFigures:
        """The loss of this rank's microbatches as one global batch with the other ranks', without training."""

    def evaluated_part(self) -> torch.nn.Module | None:
        """What this process holds of the model, all its chunks, with the weights that it computes with after the last
        step: for use between steps, together with the processes of its model-parallel group and no others. None where
        parameters are not whole between steps (ZeRO 3). Collective; ask again after a step."""

    def expected_shapes(self, optimizer: bool = True) -> dict[str, Shape]:
        """Canonical name → global shape of every tensor that `load` (or `load_weights`) needs."""

    def pieces(self) -> list[Piece]:
        """What this process has to save after the last step: with those of all other processes, every element of every
        tensor of `expected_shapes` once. The engine's own memory: copy it before the next step."""

    def metadata(self) -> dict[str, Any]:
        """JSON that belongs to the tensors: steps taken, the loss scale. The same on every process."""

    def load(self, source: TensorSource, metadata: dict[str, Any]) -> None:
        """Go on from what `pieces` and `metadata` gave, in whatever layout that was; in the same one bit for bit.

        Each process reads its own blocks. CheckpointError lists every missing, unexpected or mis-shaped tensor.
        """

    def load_weights(self, source: TensorSource) -> None:
        """Take the weights (`model/…`) only; optimizer and step stay as they are. CheckpointError as above."""

    def state_dict(self) -> EngineState:
        """The state after the last step. Collective; whole tensors on the main process, none on the others. For
        comparisons: checkpoints are written from `pieces`."""

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The weights (`model/…`) alone, as `state_dict` gives them. Collective."""

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same one after another, of which no process then holds more than one. Every process must go through it
        to its end."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """Parameter name → whole gradient of the last `train_step`, scaled as the optimizer left it: as summed, when
        nothing was clipped. Collective; on the main process alone. For comparisons."""
