"""The DeepSpeed engine: ZeRO around the same model, our totals, our learning rates, our verdict on a step.

One step, in order: Z and other totals of the global batch → forward and backward of every microbatch → gradients
summed over tensor-parallel processes where each saw a part (without pipeline stages as they arise), and over
data-parallel ones → gradient norm → step, unless something is not finite.

The loss is divided by Z before the backward pass, so gradients must only be *summed*: over microbatches and ranks.
DeepSpeed divides by the number of ranks that hold the same parameters, so the loss is multiplied by it; its division by
accumulation steps is left out. Processes that share frames each differentiate 1/`layout.cp` of the loss, as in the
Megatron engine.

How microbatches pass through the model is a matter of their own: `deepspeed_whole`, and with pipeline stages
`deepspeed_pipeline`.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from moss_train.parallel import groups  # first: installs the CPU seam before megatron is imported

# isort: split
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import nn

from moss_train.data.batch import Batch
from moss_train.engines import loss_scale, optimizer_state
from moss_train.engines.config import EngineConfig, OptimConfig
from moss_train.engines.deepspeed_library import forget_gradients, initialize, load, remove_hooks
from moss_train.engines.deepspeed_settings import deepspeed_settings
from moss_train.engines.deepspeed_shards import Shards
from moss_train.engines.deepspeed_state import DeepSpeedState
from moss_train.engines.deepspeed_store import SharedParameters
from moss_train.engines.deepspeed_whole import WholePasses
from moss_train.engines.engine_rules import check_engine, check_optimizer
from moss_train.engines.fit import require_fit
from moss_train.engines.frames import is_of_encoder
from moss_train.engines.full_tensors import Entry, stream_to_main
from moss_train.engines.gradients import clip_to_norm, global_norm
from moss_train.engines.held_optimizer import held_optimizer
from moss_train.engines.learning_rate import LearningRate
from moss_train.engines.megatron_state import OPTIMIZER
from moss_train.engines.optimizer_state import MAIN, HeldState
from moss_train.engines.pieces import Piece, TensorSource
from moss_train.engines.protocol import EngineState, StepOutput
from moss_train.engines.trainable import check_trainable
from moss_train.engines.weights import NAMESPACE
from moss_train.errors import ConfigError
from moss_train.model.build import whole_model
from moss_train.model.groups import parameter_groups
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import LossOutput, StreamingLoss
from moss_train.parallel.agreement import any_rank
from moss_train.parallel.phases import phase


class DeepSpeedEngine:
    """See `protocol.Engine`. ZeRO 0 to 3 with tensor, sequence, data and frame parallelism; float32, bfloat16 and
    float16."""

    def __init__(self, config: EngineConfig):
        self._config = config

    def parameter_store(self) -> SharedParameters | None:
        """See `protocol.Engine.parameter_store`."""
        state = groups.state()
        return SharedParameters(self._config, state) if state.layout.zero == 3 else None

    def setup(
        self,
        model: VideoModel,
        trainable: set[str],
        optim: OptimConfig,
        objective: StreamingLoss,
        total_steps: int,
    ) -> None:
        """See `protocol.Engine.setup`. `model` is what this process holds (`model.build.build_model`)."""
        optim.validate()
        self._parallel = groups.state()
        layout = self._parallel.layout
        self._precision = Precision.of(model.config.params_dtype, bool(model.config.fp8))
        check_engine(self._config, layout, self._precision.name)
        check_optimizer(self._config, layout, optim.name)
        with torch.device("meta"):
            whole = whole_model(model.sizes, self._parallel)
        self._group_of = parameter_groups(whole)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        check_trainable(trainable, self._group_of, optim)
        self._trainable = set(trainable)
        self._optim = optim
        objective.split_over(self._parallel.tensor_group, vocab_parallel_cross_entropy)
        self._objective = objective
        self._rates = LearningRate(optim, total_steps)
        self.step = 0
        self.skipped_steps = 0
        self._keep_gradients = False

        empty = [name for name, shape in self._shapes.items() if 0 in shape]
        if layout.zero == 3 and empty:
            raise ConfigError(
                f"layout.zero=3: ZeRO 3 cannot share out {', '.join(empty)}, which has no elements; set layout.zero=2"
            )

        self._model = model.to(self._parallel.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        self._trained = {name: parameter for name, parameter in model.named_parameters() if name in trainable}
        self._trained_groups = sorted({self._group_of[name] for name in trainable})
        self._settings = deepspeed_settings(self._config, layout, self._precision.name, optim.clip)
        param_groups, placeholders = self._param_groups()
        self._optimizer = held_optimizer(optim, param_groups, fused=self._parallel.device.type == "cuda")
        self._passes = self._passes_of(model, placeholders)
        # Some of DeepSpeed's optimizers take a step with zero gradients when they start.
        self._optimizer.held = True
        self._engine = initialize(self._passes.module, self._optimizer, self._settings, self._parallel)
        # Its hooks on the parameters keep it, and the model, alive for good otherwise: Python sees no such cycle.
        weakref.finalize(self, remove_hooks, self._engine).atexit = False
        self._passes.attach(self._engine)
        self._shards = Shards(self._engine, self._optimizer, layout.zero)
        self._optimizer.state.clear()
        self._optimizer.initialise(self._shards.stepped())
        self._optimizer.held = False
        self._scaler = loss_scale.scaler_of(self._engine.optimizer) if self._precision.name == "fp16" else None
        self._state = DeepSpeedState(model, self._trained, self._shards, self._moments, self._parallel)

    @property
    def keep_gradients(self) -> bool:
        """See `protocol.Engine.keep_gradients`."""
        return self._keep_gradients

    @keep_gradients.setter
    def keep_gradients(self, keep: bool) -> None:
        self._keep_gradients = self._optimizer.keep_gradients = keep

    def train_step(self, microbatches: Sequence[Batch], loss_limit: float | None = None) -> StepOutput:
        """See `protocol.Engine.train_step`."""
        self._optimizer.kept.clear()
        with phase("forward"):
            figures = self._run(microbatches, training=True)
        with phase("reduce"):
            return self._take_step(figures, loss_limit)

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Batch]) -> LossFigures:
        """See `protocol.Engine.eval_step`."""
        return self._run(microbatches, training=False)

    def evaluated_part(self) -> VideoModel | None:
        """See `protocol.Engine.evaluated_part`."""
        return None if self._parallel.layout.zero == 3 else self._model

    def expected_shapes(self, optimizer: bool = True) -> dict[str, tuple[int, ...]]:
        """See `protocol.Engine.expected_shapes`."""
        shapes = {f"{NAMESPACE}/{name}": shape for name, shape in self._shapes.items()}
        if optimizer:
            shapes |= {
                f"{OPTIMIZER}/{name}/{moment}": self._shapes[name]
                for name in sorted(self._trainable)
                for moment in self._moments
            }
        return shapes

    def pieces(self) -> list[Piece]:
        """See `protocol.Engine.pieces`."""
        return self._state.owned()

    def metadata(self) -> dict[str, Any]:
        """See `protocol.Engine.metadata`. Holds the dictionary that DeepSpeed was given, too."""
        metadata: dict[str, Any] = {
            "engine": "deepspeed",
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "total_steps": self._rates.total_steps,
            "deepspeed": self._settings,
        }
        if self._scaler is not None and self._scaler.dynamic:
            metadata["loss_scale"] = loss_scale.saved(self._scaler, self._parallel.data_ranks)
        return metadata

    def state_dict(self) -> EngineState:
        """See `protocol.Engine.state_dict`."""
        moments = [
            (f"{OPTIMIZER}/{name}/{moment}", parameter, self._assembler(parameter, self._shards.held, moment))
            for name, parameter in self._trained.items()
            for moment in self._moments
        ]
        return EngineState(self._collect(self._weight_entries() + moments, self.expected_shapes()), self.metadata())

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """See `protocol.Engine.whole_weights`."""
        return dict(self.each_weight())

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `protocol.Engine.each_weight`."""
        return stream_to_main(self._weight_entries(), self._parallel, self.expected_shapes(optimizer=False))

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `protocol.Engine.gradients`."""
        if not self._keep_gradients:
            raise RuntimeError("set keep_gradients before the step after which gradients are wanted")
        entries: list[Entry] = [
            (name, parameter, self._assembler(parameter, self._shards.gradient, MAIN))
            for name, parameter in self._trained.items()
        ]
        return self._collect(entries, self._trainable)

    def load(self, source: TensorSource, metadata: dict[str, Any]) -> None:
        """See `protocol.Engine.load`."""
        shapes = {
            name: shape for name, shape in source.shapes().items() if name.split("/")[0] in (NAMESPACE, OPTIMIZER)
        }
        require_fit(shapes, self.expected_shapes(), source.origin)
        self._state.load(source, optimizer=True)
        self.step = int(metadata["step"])
        self.skipped_steps = int(metadata["skipped_steps"])
        self._optimizer.set_step_count(self.step - self.skipped_steps)
        if metadata.get("loss_scale") and self._scaler is not None and self._scaler.dynamic:
            loss_scale.restore(self._scaler, metadata["loss_scale"], self._parallel.data_ranks)

    def load_weights(self, source: TensorSource) -> None:
        """See `protocol.Engine.load_weights`."""
        shapes = {name: shape for name, shape in source.shapes().items() if name.startswith(f"{NAMESPACE}/")}
        require_fit(shapes, self.expected_shapes(optimizer=False), source.origin)
        self._state.load(source, optimizer=False)

    @property
    def _moments(self) -> tuple[str, ...]:
        return optimizer_state.MOMENTS if self._optim.name == "adamw" else ()

    def _passes_of(self, model: VideoModel, placeholders: list[nn.Parameter]) -> "Passes":
        if self._parallel.pipeline_ranks == 1:
            return WholePasses(model, self._trained, self._objective, self._parallel)
        load()
        from moss_train.engines.deepspeed_pipeline import PipelinePasses

        return PipelinePasses(model, self._trained, placeholders, self._objective, self._parallel)

    def _param_groups(self) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        """One optimizer group for each parameter group, halved into matrices and the rest, which must not decay.

        DeepSpeed measures norms group by group, over all stages of a pipeline, so all have the same groups. Where a
        stage has nothing in one, a placeholder of one element, whose gradient is zero, stands in; these come second.
        """
        members: dict[tuple[str, bool], list[nn.Parameter]] = {
            (self._group_of[name], len(self._shapes[name]) > 1): []
            for name in self._trainable
            if 0 not in self._shapes[name]
        }
        for name, parameter in self._trained.items():
            # Not the parameter's own, of which ZeRO 3 may have left nothing.
            shape = self._shapes[name]
            if 0 not in shape:
                members[self._group_of[name], len(shape) > 1].append(parameter)
        placeholders = {key: self._placeholder() for key, held in members.items() if not held}
        groups_of_all = [
            {
                "params": members[key] or [placeholders[key]],
                "group": key[0],
                "weight_decay": self._optim.weight_decay if key[1] else 0.0,
            }
            for key in sorted(members)
        ]
        return groups_of_all, list(placeholders.values())

    def _placeholder(self) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(1, dtype=self._precision.dtype, device=self._parallel.device))
        parameter.tensor_model_parallel = True  # so that each process has something to take the norm of
        return parameter

    def _run(self, microbatches: Sequence[Batch], training: bool) -> LossFigures:
        if not microbatches:
            raise ValueError("a step needs at least one microbatch; give a batch without labels to stand aside")
        state = self._parallel
        tokens = self._precision.token_multiple(state.tensor_ranks, state.layout.sp)
        batches = [batch.padded(tokens).to(state.device, frames=False) for batch in self._passes.batches(microbatches)]
        outputs = self._passes.run(batches, self._global_totals(batches), training)
        summed = statistics(outputs, len(self._objective.sources)).to(state.device)
        dist.all_reduce(summed, group=state.data_group)
        if state.pipeline_ranks > 1:
            # Only the stage with the head has seen them.
            dist.all_reduce(summed, group=state.pipeline_group)
        return LossFigures.from_statistics(summed, self._objective.sources)

    def _take_step(self, figures: LossFigures, loss_limit: float | None) -> StepOutput:
        """Update the weights, unless something says not to. Loss and norm are sums over every rank, so all ranks come
        to the same verdict whether they are finite."""
        rates = self._set_learning_rates()
        withheld = not math.isfinite(figures.loss)
        withheld = (loss_limit is not None and any_rank(figures.loss > loss_limit)) or withheld
        grad_norm, overflowed = None, False
        if not self._shards.sharded:
            grad_norm = global_norm(self._counted(), self._parallel)
            withheld = withheld or not math.isfinite(grad_norm)
            clip_to_norm(self._trained.values(), grad_norm, self._optim.clip)
        scale_can_fall = self._scaler is not None and loss_scale.can_fall(self._scaler)
        self._optimizer.held = withheld
        self._passes.step()
        self._optimizer.held = False
        if self._shards.sharded:
            overflowed = bool(self._engine.optimizer.overflow)
            if overflowed:
                forget_gradients(self._engine.optimizer)
            grad_norm = math.inf if overflowed else float(self._engine.get_global_grad_norm())
        skipped = withheld or overflowed
        self.step += 1
        self.skipped_steps += skipped
        expected = overflowed and math.isfinite(figures.loss) and scale_can_fall
        return StepOutput(**vars(figures), grad_norm=grad_norm, lr=rates, skipped=skipped, overflowed=expected)

    def _counted(self) -> Iterator[nn.Parameter]:
        """The trained parameters that this stage counts in the gradient norm: copies of the encoder on later stages are
        not counted again."""
        for name, parameter in self._trained.items():
            if self._parallel.first_stage or not is_of_encoder(name):
                yield parameter

    def _global_totals(self, batches: Sequence[Batch]) -> torch.Tensor:
        total = torch.stack([self._objective.totals(batch) for batch in batches]).sum(dim=0)
        dist.all_reduce(total, group=self._parallel.data_group)
        return total

    def _set_learning_rates(self) -> dict[str, float]:
        rates = {group: self._rates.rate(group, self.step) for group in self._trained_groups}
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["group"]]
        return rates

    def _collect(self, entries: list[Entry], names) -> dict[str, torch.Tensor]:
        return dict(stream_to_main(entries, self._parallel, names))

    def _weight_entries(self) -> list[Entry]:
        return [
            (
                f"{NAMESPACE}/{name}",
                parameter,
                self._assembler(parameter, self._shards.held if name in self._trained else self._shards.weight, MAIN),
            )
            for name, parameter in self._model.named_parameters()
        ]

    def _assembler(
        self, parameter: nn.Parameter, find: Callable[[nn.Parameter], HeldState], kind: str
    ) -> Callable[[], torch.Tensor]:
        """What gives this tensor-parallel rank's part of one tensor of a parameter; collective where it is split
        further. A frozen parameter keeps its precision."""
        trained, shape = parameter.requires_grad, self._shards.shape(parameter)
        split = self._shards.sharded if trained else self._shards.weights_sharded

        def assemble() -> torch.Tensor:
            held = find(parameter)
            if not split and held.tensors:
                return held.tensors[kind].detach().view(shape)
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self._parallel.device)
            if held.end > held.start:
                flat[held.start : held.end] = held.tensors[kind].float()
            dist.all_reduce(flat, group=self._parallel.data_frame_group)
            return flat.view(shape) if trained else flat.view(shape).to(parameter.dtype)

        return assemble


class Passes(Protocol):
    """How the microbatches of a step pass through what this process holds of the model."""

    module: nn.Module  #: what DeepSpeed wraps

    def attach(self, engine: Any) -> None:
        """Take DeepSpeed's engine around `module`."""

    def batches(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """What is run in place of these: each cut to this process's share of frames, perhaps with blank ones more.
        Collective."""

    def run(self, batches: Sequence[Batch], totals: torch.Tensor, training: bool) -> list[LossOutput]:
        """Forward passes and, for training, backward passes and the sums of gradients. The loss of each microbatch,
        without a graph; none where the head is not. Collective."""

    def step(self) -> None:
        """DeepSpeed's own step, which also clears gradients."""
