"""The megatron-core engine: its DDP, its optimizers, its forward-backward schedules, our totals and rates.

One step, in order: Z and other totals of the global batch → frames encoded ahead, if the layout says so → schedule
(forward and backward of every microbatch) → gradients of what was encoded ahead → gradient sums → gradient norm → step,
unless something is not finite.

The loss is divided by Z before the backward pass, so gradients must only be *summed*: over microbatches and ranks.
Megatron divides by both counts unless `calculate_per_token_loss` is set; then it would divide by a token count in
`finalize_model_grads`, in whose place `gradients.sum_gradients` stands. Processes that share frames compute the same
text and each differentiate 1/`layout.cp` of the loss (`model.frame_parallel` says why their sum is right).
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from moss_train.parallel import groups  # first: installs the CPU seam before megatron is imported

# isort: split
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from moss_train.data.batch import Batch
from moss_train.engines import optimizer_state
from moss_train.engines.config import EngineConfig, OptimConfig
from moss_train.engines.engine_rules import check_engine, check_optimizer
from moss_train.engines.fit import require_fit
from moss_train.engines.frames import FrameFeatures, plans_of, received
from moss_train.engines.full_tensors import Entry, stream_to_main
from moss_train.engines.gradients import sum_gradients
from moss_train.engines.learning_rate import LearningRate
from moss_train.engines.megatron_state import OPTIMIZER, MegatronState
from moss_train.engines.neighbours import watched_messages
from moss_train.engines.pieces import Piece, TensorSource
from moss_train.engines.protocol import EngineState, StepOutput
from moss_train.engines.stages import ChunkCalls, DecoderChunk, FrameEncoder
from moss_train.engines.trainable import check_trainable
from moss_train.engines.weights import NAMESPACE
from moss_train.model.build import whole_model
from moss_train.model.groups import parameter_groups
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel.agreement import any_rank
from moss_train.parallel.phases import phase


class MegatronEngine:
    """See `protocol.Engine`. Tensor, sequence, pipeline, data and frame parallelism; float32, bfloat16 and float16."""

    keep_gradients = False  #: they are there until the next step in any case

    def __init__(self, config: EngineConfig | None = None):
        self._config = config or EngineConfig()

    def parameter_store(self) -> None:
        """See `protocol.Engine.parameter_store`."""

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
        self._precision = Precision.of(model.config.params_dtype, bool(model.config.fp8))
        check_engine(self._config, self._parallel.layout, self._precision.name)
        check_optimizer(self._config, self._parallel.layout, optim.name)
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

        self._model = model.to(self._parallel.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        self._trained = {name: parameter for name, parameter in model.named_parameters() if name in trainable}
        self._trained_groups = sorted({self._group_of[name] for name in trainable})
        self._wrap()
        self._optimizer = self._build_optimizer()
        optimizer_state.initialise_moments(self._optimizer)
        self._state = MegatronState(model, self._trained, self._optimizer, self._moments, self._parallel)
        self._megatron.grad_scale_func = self._optimizer.scale_loss
        self._schedule = get_forward_backward_func()
        self._messages = watched_messages(self._megatron) if self._parallel.pipeline_ranks > 1 else {}

    def train_step(self, microbatches: Sequence[Batch], loss_limit: float | None = None) -> StepOutput:
        """See `protocol.Engine.train_step`."""
        for wrapped in self._wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        with phase("forward"):
            figures = self._run_schedule(microbatches, forward_only=False)
        with phase("reduce"):
            return self._take_step(figures, loss_limit)

    def _take_step(self, figures: LossFigures, loss_limit: float | None) -> StepOutput:
        """Sum the gradients and update the weights, unless something says not to."""
        sum_gradients(self._chunks, self._encoder_ddp, self._parallel)
        rates = self._set_learning_rates()
        overflowed = bool(self._optimizer.prepare_grads())
        grad_norm = float(self._optimizer.get_grad_norm())
        # Loss and norm are sums over every rank, so all ranks come to the same verdict whether they are finite.
        skipped = overflowed or not (math.isfinite(figures.loss) and math.isfinite(grad_norm))
        skipped = (loss_limit is not None and any_rank(figures.loss > loss_limit)) or skipped
        if not skipped:
            self._clip(grad_norm)
            self._optimizer.step_with_ready_grads()
        self.step += 1
        self.skipped_steps += skipped
        expected = overflowed and math.isfinite(figures.loss) and self._scale_can_fall()
        return StepOutput(**vars(figures), grad_norm=grad_norm, lr=rates, skipped=skipped, overflowed=expected)

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Batch]) -> LossFigures:
        """See `protocol.Engine.eval_step`."""
        for wrapped in self._wrapped:
            wrapped.eval()
        return self._run_schedule(microbatches, forward_only=True)

    def evaluated_part(self) -> VideoModel:
        """See `protocol.Engine.evaluated_part`."""
        # Layers find their weights gathered then, and ask no other process for them.
        self._finish_param_gather()
        return self._model

    def expected_shapes(self, optimizer: bool = True) -> dict[str, tuple[int, ...]]:
        """See `protocol.Engine.expected_shapes`."""
        shapes = {f"{NAMESPACE}/{name}": shape for name, shape in self._shapes.items()}
        if optimizer:
            shapes |= {
                f"optimizer/{name}/{moment}": self._shapes[name]
                for name in sorted(self._trainable)
                for moment in self._moments
            }
        return shapes

    def pieces(self) -> list[Piece]:
        """See `protocol.Engine.pieces`."""
        return self._state.owned()

    def metadata(self) -> dict[str, Any]:
        """See `protocol.Engine.metadata`."""
        metadata: dict[str, Any] = {
            "engine": "megatron",
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "total_steps": self._rates.total_steps,
        }
        if (scaler := self._optimizer.chained_optimizers[0].grad_scaler if self._half else None) is not None:
            metadata["loss_scale"] = {name: _plain(value) for name, value in scaler.state_dict().items()}
        return metadata

    def state_dict(self) -> EngineState:
        """See `protocol.Engine.state_dict`."""
        moments = [
            self._state_entry(f"optimizer/{name}/{moment}", parameter, moment)
            for name, parameter in self._trained.items()
            for moment in self._moments
        ]
        return EngineState(self._collect(self._weight_entries() + moments, self.expected_shapes()), self.metadata())

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """See `protocol.Engine.whole_weights`."""
        return dict(self.each_weight())

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `protocol.Engine.each_weight`."""
        self._finish_param_gather()
        return stream_to_main(self._weight_entries(), self._parallel, self.expected_shapes(optimizer=False))

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `protocol.Engine.gradients`."""
        entries: list[Entry] = [
            (name, parameter, lambda parameter=parameter: self._gradient(parameter))
            for name, parameter in self._trained.items()
        ]
        return self._collect(entries, self._trainable)

    def load(self, source: TensorSource, metadata: dict[str, Any]) -> None:
        """See `protocol.Engine.load`."""
        shapes = {
            name: shape for name, shape in source.shapes().items() if name.split("/")[0] in (NAMESPACE, OPTIMIZER)
        }
        require_fit(shapes, self.expected_shapes(), source.origin)
        self._finish_param_gather()
        self._state.load(source, optimizer=True)
        self.step = int(metadata["step"])
        self.skipped_steps = int(metadata["skipped_steps"])
        optimizer_state.set_step_count(self._optimizer, self.step - self.skipped_steps)
        if metadata.get("loss_scale") and self._half and self._config.loss_scale is None:
            scaler = self._optimizer.chained_optimizers[0].grad_scaler
            saved = dict(metadata["loss_scale"])
            saved["scale"] = torch.tensor([saved["scale"]], dtype=torch.float32, device=self._parallel.device)
            scaler.load_state_dict(saved)

    def load_weights(self, source: TensorSource) -> None:
        """See `protocol.Engine.load_weights`."""
        shapes = {name: shape for name, shape in source.shapes().items() if name.startswith(f"{NAMESPACE}/")}
        require_fit(shapes, self.expected_shapes(optimizer=False), source.origin)
        self._finish_param_gather()
        self._state.load(source, optimizer=False)

    @property
    def _half(self) -> bool:
        return self._megatron.fp16

    @property
    def _moments(self) -> tuple[str, ...]:
        return optimizer_state.MOMENTS if self._optim.name == "adamw" else ()

    def _scale_can_fall(self) -> bool:
        """Whether the loss scale answers overflows, and is not at its lowest yet."""
        scaler = self._optimizer.chained_optimizers[0].grad_scaler if self._half else None
        least = getattr(scaler, "min_scale", None)  # a constant scale has none
        return least is not None and bool(scaler.scale > least)

    def _wrap(self) -> None:
        """Wrap the decoder's chunks and the encoder, which is a chunk of its own: other processes hold it, and its
        gradients come from other places."""
        self._megatron = self._schedule_config()
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self._parallel.layout.zero == 1,
            overlap_grad_reduce=self._config.overlap_grad_reduce,
            overlap_param_gather=self._config.overlap_param_gather,
        )

        def wrap(module: torch.nn.Module, bucketed: bool = True) -> DistributedDataParallel:
            wrapped = DistributedDataParallel(
                config=self._megatron,
                ddp_config=copy.copy(ddp_config),
                module=module,
                disable_bucketing=not bucketed,
            )
            wrapped.broadcast_params()
            return wrapped

        virtual = len(self._model.part.chunks)
        self._chunks = [wrap(DecoderChunk(self._model, number), bucketed=number == 0) for number in range(virtual)]
        self._encoder_ddp: DistributedDataParallel | None = None
        if self._model.part.encoder:
            encoder = FrameEncoder(self._model)
            # Its copies on later stages must not be counted again in the gradient norm.
            for parameter in encoder.parameters():
                parameter.shared = not self._parallel.first_stage
            # In one bucket: megatron cuts buckets on the first stage alone, and with zero=1 shards follow the buckets.
            self._encoder_ddp = wrap(encoder, bucketed=False)
        self._frames = FrameFeatures(
            self._parallel,
            self._encoder_ddp,
            self._model,
            trains_tower=any(self._group_of[name] == "vision_tower" for name in self._trainable),
            trains_projector=any(self._group_of[name] == "projector" for name in self._trainable),
        )
        self._wrapped = [*([self._encoder_ddp] if self._encoder_ddp else []), *self._chunks]
        if self._config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self._chunks]
            self._megatron.no_sync_func = no_sync if virtual > 1 else no_sync[0]

    def _schedule_config(self):
        layout, config = self._parallel.layout, copy.copy(self._model.config)
        config.calculate_per_token_loss = True
        config.pipeline_model_parallel_size = layout.pp
        config.virtual_pipeline_model_parallel_size = layout.vpp if layout.vpp > 1 else None
        config.microbatch_group_size_per_vp_stage = layout.pp
        config.overlap_p2p_comm = layout.overlap_p2p
        config.batch_p2p_comm = layout.batches_p2p
        config.deallocate_pipeline_outputs = layout.pp > 1
        return config

    def _build_optimizer(self) -> ChainedOptimizer:
        config = OptimizerConfig(
            optimizer="adam" if self._optim.name == "adamw" else "sgd",
            lr=self._optim.lr,
            min_lr=self._optim.min_lr,
            weight_decay=self._optim.weight_decay,
            adam_beta1=self._optim.betas[0],
            adam_beta2=self._optim.betas[1],
            adam_eps=self._optim.eps,
            sgd_momentum=0.0,
            clip_grad=self._optim.clip,
            params_dtype=self._megatron.params_dtype,
            bf16=self._megatron.bf16,
            fp16=self._megatron.fp16,
            loss_scale=self._config.loss_scale if self._megatron.fp16 else None,
            initial_loss_scale=self._config.initial_loss_scale,
            use_distributed_optimizer=self._parallel.layout.zero == 1,
            overlap_param_gather=self._config.overlap_param_gather,
        )
        # One optimizer group for each parameter group, halved into matrices and the rest, which must not decay.
        members: dict[tuple[str, bool], set[int]] = {}
        for name, parameter in self._trained.items():
            members.setdefault((self._group_of[name], parameter.dim() > 1), set()).add(id(parameter))
        overrides = {
            ParamKey(predicate=ParamPredicate(f"{group}, decay {decays}", _member_of(ids))): {
                "group": group,
                "weight_decay": self._optim.weight_decay if decays else 0.0,
            }
            for (group, decays), ids in members.items()
        }
        return get_megatron_optimizer(config, self._wrapped, config_overrides=overrides, use_gloo_process_groups=False)

    def _run_schedule(self, microbatches: Sequence[Batch], forward_only: bool) -> LossFigures:
        if not microbatches:
            raise ValueError("a step needs at least one microbatch; give a batch without labels to stand aside")
        layout, state = self._parallel.layout, self._parallel
        multiple = state.tensor_ranks if layout.sp else 1
        tokens = self._precision.token_multiple(state.tensor_ranks, layout.sp)
        batches = [received(batch, state).padded(tokens).to(state.device, frames=False) for batch in microbatches]
        totals = self._global_totals(batches)
        plans = plans_of(batches, state)
        step = ChunkCalls(self._model, self._frames, batches, plans, multiple)

        def forward_step(numbers: Iterator[int], chunk: DistributedDataParallel):
            number = next(numbers)
            output = step.forward(number, chunk.module, chunk)

            def loss_of(predictions):
                loss = self._objective(predictions, batches[number], totals)
                return loss.loss / state.frame_ranks, torch.zeros((), dtype=torch.int, device=state.device), loss

            return output, loss_of

        # Nothing of the encoder is reduced before all of its gradients are there.
        with self._encoder_ddp.no_sync() if self._encoder_ddp is not None else contextlib.nullcontext():
            self._gather_skipped_weights(batches)
            self._frames.begin(batches, plans, training=not forward_only)
            outputs = self._schedule(
                forward_step_func=forward_step,
                data_iterator=[iter(range(len(batches))) for _ in self._chunks][: None if layout.vpp > 1 else 1],
                model=self._chunks if layout.vpp > 1 else self._chunks[0],
                num_microbatches=len(batches),
                # Megatron divides by both: it means to split a sequence, we mean this rank's message.
                seq_length=step.message_length * multiple * state.frame_ranks,
                micro_batch_size=1,
                forward_only=forward_only,
                **self._messages,
            )
            self._frames.finish()
        return LossFigures.from_statistics(self._summed(outputs), self._objective.sources)

    def _gather_skipped_weights(self, batches: Sequence[Batch]) -> None:
        """With overlapped gathering a layer asks for its weights when it runs. A process whose first batch has no
        frames skips layers that others run, and would ask in another order: it asks for all of them now, in the order
        in which running layers ask. Whether the encoder runs at all differs too, so its weights are always gathered
        now."""
        if not self._config.overlap_param_gather:
            return
        for wrapped in [self._encoder_ddp] if batches[0].frames else self._wrapped:
            for bucket_group in reversed(wrapped.bucket_groups if wrapped is not None else []):
                bucket_group.finish_param_sync()

    def _summed(self, outputs: list) -> torch.Tensor:
        """The step's statistics on every rank; only the last stage has seen them."""
        state = self._parallel
        sources = len(self._objective.sources)
        summed = statistics(outputs, sources) if state.last_stage else statistics([], sources).to(state.device)
        torch.distributed.all_reduce(summed, group=state.data_group)
        if state.pipeline_ranks > 1:
            torch.distributed.all_reduce(summed, group=state.pipeline_group)
        return summed

    def _global_totals(self, microbatches: Sequence[Batch]) -> torch.Tensor:
        total = torch.stack([self._objective.totals(batch) for batch in microbatches]).sum(dim=0)
        torch.distributed.all_reduce(total, group=self._parallel.data_group)
        return total

    def _set_learning_rates(self) -> dict[str, float]:
        rates = {group: self._rates.rate(group, self.step) for group in self._trained_groups}
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["group"]]
        return rates

    def _clip(self, grad_norm: float) -> None:
        """The clipping of megatron's `ChainedOptimizer.step`, which has no place for a verdict before its step."""
        if self._optim.clip > 0.0:
            for part in self._optimizer.chained_optimizers:
                # A stage may train nothing, and the fused kernel reads the first of its tensors.
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self._optim.clip, grad_norm)

    def _collect(self, entries: list[Entry], names) -> dict[str, torch.Tensor]:
        self._finish_param_gather()
        return dict(stream_to_main(entries, self._parallel, names))

    def _weight_entries(self) -> list[Entry]:
        return [
            self._state_entry(f"{NAMESPACE}/{name}", parameter, optimizer_state.MAIN)
            if name in self._trained
            else (f"{NAMESPACE}/{name}", parameter, lambda parameter=parameter: parameter)
            for name, parameter in self._model.named_parameters()
        ]

    def _state_entry(self, name: str, parameter: torch.nn.Parameter, kind: str) -> Entry:
        group = self._parallel.data_frame_group
        return name, parameter, lambda: optimizer_state.whole_over_replicas(kind, self._optimizer, parameter, group)

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._parallel.layout.zero == 0:
            return parameter.main_grad
        held = optimizer_state.held_state(self._optimizer, parameter)
        own = parameter.main_grad.reshape(-1)[held.start : held.end]
        return optimizer_state.assembled(own, held, parameter, self._parallel.data_frame_group)

    def _finish_param_gather(self) -> None:
        """With overlapped gathering, weights are old until the next forward pass has gathered them."""
        if self._config.overlap_param_gather:
            for wrapped in self._wrapped:
                wrapped.disable_forward_pre_hook()
                wrapped.enable_forward_pre_hook()


def _plain(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def _member_of(ids: set[int]):
    return lambda parameter: id(parameter) in ids
