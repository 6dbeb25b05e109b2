"""Forward and backward passes of a DeepSpeed engine with pipeline stages: DeepSpeed's schedules around our chunks.

Of DeepSpeed this takes the schedules (1F1B and DualPipeV), the exchange of messages and the optimizers. Ours are the
process groups, what a stage holds, the one float tensor between stages (`parallel.message`), who encodes frames and
when (`engines.frames`), and when gradients are summed: after the schedule, once a step.

Imports DeepSpeed, so it is imported where an engine with pipeline stages is set up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from moss_train.data.batch import Batch
from moss_train.engines.deepspeed_groups import StageGroups
from moss_train.engines.even_work import blank_batch
from moss_train.engines.frames import FrameFeatures, is_of_encoder, plans_of, received, sees_a_part
from moss_train.engines.gradients import add_up
from moss_train.engines.stages import ChunkCalls, DecoderChunk, FrameEncoder
from moss_train.model.predictions import Predictions
from moss_train.model.video_model import VideoModel
from moss_train.objectives.streaming_loss import LossOutput, StreamingLoss, detached
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.phases import phase


class PipelinePasses:
    """See `deepspeed.Passes`. Each process holds one chunk of the layers, or with DualPipeV two."""

    def __init__(
        self,
        model: VideoModel,
        trained: Mapping[str, nn.Parameter],
        placeholders: Sequence[nn.Parameter],
        objective: StreamingLoss,
        parallel: ParallelState,
    ):
        """`placeholders`: parameters that only fill optimizer groups."""
        self._model, self._trained, self._placeholders = model, trained, placeholders
        self._objective, self._parallel = objective, parallel
        chunks = [DecoderChunk(model, number) for number in range(len(model.part.chunks))]
        encoder = FrameEncoder(model) if model.part.encoder else None
        two_ways = parallel.layout.dualpipev
        self.module = (_TwoWayStage if two_ways else _Stage)(chunks, encoder, placeholders, StageGroups(parallel))
        if encoder is not None:
            for parameter in encoder.parameters():
                # Copies on later stages are not counted again in the gradient norm.
                parameter.ds_pipe_replicated = not parallel.first_stage
        self._frames = FrameFeatures(
            parallel,
            encoder,
            model,
            trains_tower=any(name.startswith("vision_tower.") for name in trained),
            trains_projector=any(name.startswith("projector.") for name in trained),
            backward=self._backward,
        )
        self._least = 2 * parallel.pipeline_ranks if two_ways else 1

    def attach(self, engine: Any) -> None:
        """See `deepspeed.Passes.attach`."""
        self._engine = engine
        # Every step has as many microbatches as its data needs, and gradients are divided by none of our counts.
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        usual = type(engine)._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {
            **usual,
            **{message: _watched(usual[message]) for message in _MESSAGES if message in usual},
            schedule.RecvGrad: _watched(_into_new_memory(usual[schedule.RecvGrad])),
            schedule.LoadMicroBatch: _place_nothing,
            # The engine sums gradients and steps itself, after the schedule.
            **dict.fromkeys((schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep), _leave_out),
        }

    def batches(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """See `deepspeed.Passes.batches`."""
        own = [received(batch, self._parallel) for batch in microbatches]
        missing = self._least - len(own)
        return own + [received(blank_batch(own[0]), self._parallel)] * missing

    def run(self, batches: Sequence[Batch], totals: torch.Tensor, training: bool) -> list[LossOutput]:
        """See `deepspeed.Passes.run`."""
        plans = plans_of(batches, self._parallel)
        token_ranks = self._parallel.tensor_ranks if self._parallel.layout.sp else 1
        calls = ChunkCalls(self._model, self._frames, batches, plans, token_ranks)
        outputs: list[LossOutput] = []
        self.module.begin(calls, self._loss_of(batches, totals, outputs), len(batches))
        engine = self._engine
        engine.micro_batches = len(batches)
        engine.total_loss, engine._compute_loss = None, False
        engine.module.train(training)
        # Messages have one length in a step, and another in the next.
        engine.reset_activation_shape()
        self._frames.begin(batches, plans, training)
        with torch.set_grad_enabled(training):
            engine._exec_schedule(engine._train_schedule() if training else engine._inference_schedule(len(batches)))
        if training:
            self._frames.finish()
            with phase("reduce"):
                self._sum_gradients()
        self.module.end()
        return outputs

    def step(self) -> None:
        """See `deepspeed.Passes.step`."""
        self._engine._exec_optimizer_step()

    def _loss_of(
        self, batches: Sequence[Batch], totals: torch.Tensor, outputs: list[LossOutput]
    ) -> Callable[[int, Predictions], torch.Tensor]:
        def loss_of(number: int, predictions: Predictions) -> torch.Tensor:
            output = self._objective(predictions, batches[number], totals)
            outputs.append(detached(output))
            # DeepSpeed averages over the processes that hold the same parameters, data × frame ranks.
            return output.loss * self._parallel.data_ranks

        return loss_of

    def _sum_gradients(self) -> None:
        """Complete the accumulated gradients: over the processes that each saw a part of what a parameter was applied
        to, then over those that hold the same parameters."""
        self._fill_missing()
        state = self._parallel
        encoder, others = [], []
        for name, parameter in self._trained.items():
            if sees_a_part(name, parameter):
                (encoder if is_of_encoder(name) else others).append(parameter)
        encoders = state.model_group if state.layout.sharding == "model_parallel" else state.tensor_group
        add_up([self._accumulated(parameter) for parameter in encoder], encoders)
        add_up([self._accumulated(parameter) for parameter in others], state.tensor_group)
        self._engine._exec_reduce_grads()

    def _fill_missing(self) -> None:
        """Zeros for the gradients that did not arise on this process, such as those of a tower without frames: others
        have them, and sum them with it."""

        def fill() -> None:
            for parameter in [*self._trained.values(), *self._placeholders]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

        self._outside_of_schedule(fill)

    def _backward(self, tensors: torch.Tensor, gradients: torch.Tensor) -> None:
        """A backward pass that no schedule knows of."""
        self._outside_of_schedule(lambda: torch.autograd.backward(tensors, gradients))

    def _outside_of_schedule(self, work: Callable[[], None]) -> None:
        """Do `work`, which leaves gradients in `.grad`, as DeepSpeed surrounds a backward pass: with 16-bit parameters
        they are added to float32 sums kept elsewhere."""
        engine = self._engine
        engine._running_engine_backward = True
        try:
            engine._backward_prologue()
            work()
            engine._backward_epilogue()
        finally:
            engine._running_engine_backward = False

    def _accumulated(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where DeepSpeed adds up a parameter's gradients of the step."""
        if self._engine.using_bf16_optimizer:
            return parameter._hp_grad
        optimizer = self._engine.optimizer
        kept_elsewhere = getattr(optimizer, "get_param_gradient_attribute", None)
        return kept_elsewhere(parameter) if kept_elsewhere is not None else parameter.grad


class _Stage(PipelineModule):
    """What DeepSpeed's pipeline engine wraps: the part of the model that this process holds."""

    active_phase = 0  #: which of its chunks runs

    def __init__(
        self,
        chunks: Sequence[DecoderChunk],
        encoder: FrameEncoder | None,
        placeholders: Sequence[nn.Parameter],
        stage_groups: StageGroups,
    ):
        # Not PipelineModule's: that makes process groups of its own and cuts a list of layers.
        nn.Module.__init__(self)
        self.chunks = nn.ModuleList(chunks)
        self.encoder = encoder
        self.placeholders = nn.ParameterList(placeholders)
        # What DeepSpeed's engine reads of such a module.
        self._grid = stage_groups
        self.loss_fn = None  # the last chunk gives the loss itself
        self.tied_comms: dict[str, Any] = {}
        self.activation_checkpoint_interval = 0  # layers recompute themselves
        self.activation_checkpoint_func = None
        self.dynamic_shape = False
        self._local_start, self._local_stop = stage_groups.get_stage_id(), stage_groups.get_stage_id() + 1
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def begin(self, calls: ChunkCalls, loss_of: Callable[[int, Predictions], torch.Tensor], microbatches: int) -> None:
        """A step begins. `loss_of`: (number of the microbatch, predictions) → what is differentiated."""
        self._calls, self._loss_of = calls, loss_of
        self._numbers: list[Iterator[int]] = [iter(range(microbatches)) for _ in self.chunks]

    def end(self) -> None:
        """The step's passes are done, and its batches are not needed any more."""
        del self._calls, self._loss_of

    def forward(self, message: torch.Tensor) -> torch.Tensor:
        """Run the active chunk on its next microbatch: schedules keep their order in every chunk."""
        chunk: DecoderChunk = self.chunks[self.active_phase]
        number = next(self._numbers[self.active_phase])
        chunk.set_input_tensor(None if chunk.is_first else message)
        output = self._calls.forward(number, chunk, chunk)
        return self._loss_of(number, output) if chunk.is_last else output

    def get_additional_losses(self) -> None:
        """See PipelineModule: losses to be told apart, none."""
        return None


class _TwoWayStage(_Stage, DualPipeVModule):
    """A stage for DualPipeV, whose microbatches come by twice: on the way out and on the way back."""

    def activate_phase(self, phase: int) -> None:
        """See DualPipeVModule: the chunk that runs from now on."""
        self.active_phase = phase


_MESSAGES = (schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad, schedule.CommitP2P)


def _into_new_memory(instruction: Callable[..., None]) -> Callable[..., None]:
    """The same, but each gradient is received into memory of its own: parts of it may become the gradient of features
    that were encoded before the schedule, and are read after it."""

    def received(engine: Any, **arguments: Any) -> None:
        engine.grad_layer, engine._grad_layer_buf = None, []
        instruction(engine, **arguments)

    return received


def _watched(instruction: Callable[..., None]) -> Callable[..., None]:
    """The same, told to whoever watches: this process waits for a neighbour meanwhile."""

    def watched(engine: Any, **arguments: Any) -> None:
        with phase("p2p"):
            instruction(engine, **arguments)

    return watched


def _place_nothing(engine: Any, buffer_id: int) -> None:
    """Chunks take their microbatches from the step's calls; the first one's input stands for a message."""
    if engine.is_first_stage():
        engine.pipe_buffers["inputs"][buffer_id] = torch.zeros((), device=engine.device)


def _leave_out(engine: Any) -> None:
    pass
