"""The megatron-core engine: its DDP, its optimizer, its forward-backward schedules, our normaliser and rates.

One step, in order: Z of the global batch → schedule (forward and backward of every microbatch, then the gradient
sum over data-parallel ranks) → gradient norm → step, unless something is not finite.

The loss is divided by Z before the backward pass, so gradients must only be *summed*: over microbatches, over
ranks. Megatron divides by both counts unless `calculate_per_token_loss` is set; then it divides by a token count
in `finalize_model_grads`, which `_sum_gradients` leaves out.
"""

import copy
import math
from collections.abc import Sequence

from moss_train.parallel import groups  # first: installs the CPU seam before megatron is imported

# isort: split
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from moss_train.data.batch import Batch
from moss_train.engines import optimizer_state
from moss_train.engines.config import OptimConfig
from moss_train.engines.fit import require_fit
from moss_train.engines.learning_rate import LearningRate
from moss_train.engines.protocol import EngineState, StepOutput
from moss_train.engines.trainable import check_trainable
from moss_train.engines.weights import NAMESPACE, named_weights
from moss_train.model.groups import parameter_groups
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.streaming_loss import StreamingLoss


class _Stage(torch.nn.Module):
    """What megatron's schedules expect of a model, around ours, when the pipeline has one stage."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        if any(tensor is not None for tensor in tensors):
            raise RuntimeError("this engine runs one pipeline stage; no earlier stage can send it activations")

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model(batch)


class MegatronEngine:
    """See `protocol.Engine`. Data parallelism, float32."""

    def setup(
        self,
        model: torch.nn.Module,
        trainable: set[str],
        optim: OptimConfig,
        objective: StreamingLoss,
        total_steps: int,
    ) -> None:
        """See `protocol.Engine.setup`. `model(batch)` gives logits [T, R, V]; `model.config` is a TransformerConfig."""
        optim.validate()
        group_of = parameter_groups(model)
        check_trainable(trainable, group_of, optim)
        self._parallel = groups.state()
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
        self._trained_groups = sorted({group_of[name] for name in self._trained})
        self._ddp = self._wrap()
        self._optimizer = self._build_optimizer(group_of)
        optimizer_state.initialise_moments(self._optimizer)
        self._schedule = get_forward_backward_func()

    def train_step(self, microbatches: Sequence[Batch]) -> StepOutput:
        """See `protocol.Engine.train_step`."""
        self._ddp.train()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        figures = self._run_schedule(microbatches, forward_only=False)
        rates = self._set_learning_rates()
        overflowed = self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        # Loss and norm are sums over every rank, so all ranks come to the same verdict.
        skipped = bool(overflowed) or not (math.isfinite(figures.loss) and math.isfinite(grad_norm))
        if not skipped:
            self._clip(grad_norm)
            self._optimizer.step_with_ready_grads()
        self.step += 1
        self.skipped_steps += skipped
        return StepOutput(**vars(figures), grad_norm=grad_norm, lr=rates, skipped=skipped)

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Batch]) -> LossFigures:
        """See `protocol.Engine.eval_step`."""
        self._ddp.eval()
        return self._run_schedule(microbatches, forward_only=True)

    def expected_shapes(self, optimizer: bool = True) -> dict[str, tuple[int, ...]]:
        """See `protocol.Engine.expected_shapes`."""
        moments = optimizer_state.moments(self._optimizer, self._trained) if optimizer else {}
        return _shapes(named_weights(self._model) | moments)

    def state_dict(self) -> EngineState:
        """See `protocol.Engine.state_dict`."""
        metadata = {
            "engine": "megatron",
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "total_steps": self._rates.total_steps,
        }
        moments = optimizer_state.moments(self._optimizer, self._trained)
        return EngineState(named_weights(self._model) | moments, metadata)

    def load_state_dict(self, state: EngineState) -> None:
        """See `protocol.Engine.load_state_dict`."""
        require_fit(_shapes(state.tensors), self.expected_shapes(), "the state")
        self._copy_weights(state.tensors)
        self.step = int(state.metadata["step"])
        self.skipped_steps = int(state.metadata["skipped_steps"])
        taken = self.step - self.skipped_steps
        optimizer_state.restore_moments(self._optimizer, self._trained, state.tensors, steps=taken)

    def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        """See `protocol.Engine.load_weights`."""
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{NAMESPACE}/")}
        require_fit(_shapes(weights), self.expected_shapes(optimizer=False), "the set of weights")
        self._copy_weights(weights)

    def _wrap(self) -> DistributedDataParallel:
        config = copy.copy(self._model.config)
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = _sum_gradients
        ddp = DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            module=_Stage(self._model),
        )
        ddp.broadcast_params()
        return ddp

    def _build_optimizer(self, group_of: dict[str, str]) -> ChainedOptimizer:
        config = OptimizerConfig(
            optimizer="adam",
            lr=self._optim.lr,
            min_lr=self._optim.min_lr,
            weight_decay=self._optim.weight_decay,
            adam_beta1=self._optim.betas[0],
            adam_beta2=self._optim.betas[1],
            adam_eps=self._optim.eps,
            clip_grad=self._optim.clip,
            params_dtype=self._model.config.params_dtype,
        )
        # One optimizer group for each parameter group, halved into matrices and the rest, which must not decay.
        members: dict[tuple[str, bool], set[int]] = {}
        for name, parameter in self._trained.items():
            members.setdefault((group_of[name], parameter.dim() > 1), set()).add(id(parameter))
        overrides = {
            ParamKey(predicate=ParamPredicate(f"{group}, decay {decays}", _member_of(ids))): {
                "group": group,
                "weight_decay": self._optim.weight_decay if decays else 0.0,
            }
            for (group, decays), ids in members.items()
        }
        return get_megatron_optimizer(config, [self._ddp], config_overrides=overrides, use_gloo_process_groups=False)

    def _run_schedule(self, microbatches: Sequence[Batch], forward_only: bool) -> LossFigures:
        if not microbatches:
            raise ValueError("a step needs at least one microbatch; give a batch without labels to stand aside")
        normaliser = self._global_normaliser(microbatches)

        def forward_step(batches, stage):
            batch = next(batches).to(self._parallel.device)
            logits_TRV = stage(batch)

            def loss_of(logits_TRV):
                output = self._objective(logits_TRV, batch, normaliser)
                return output.loss, torch.zeros((), dtype=torch.int, device=logits_TRV.device), output

            return logits_TRV, loss_of

        outputs = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=self._ddp,
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].ids_RT.shape[1],
            micro_batch_size=microbatches[0].rows,
            forward_only=forward_only,
        )
        summed = statistics(outputs)
        torch.distributed.all_reduce(summed, group=self._parallel.data_group)
        return LossFigures.from_statistics(summed)

    def _global_normaliser(self, microbatches: Sequence[Batch]) -> torch.Tensor:
        parts = [self._objective.normaliser(batch).to(self._parallel.device) for batch in microbatches]
        total = torch.stack(parts).sum(dim=0)
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
                clip_grad_by_total_norm_fp32(part.get_parameters(), self._optim.clip, grad_norm)

    @torch.no_grad()
    def _copy_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in named_weights(self._model).items():
            tensor.copy_(tensors[name])
        self._optimizer.reload_model_params()


def _sum_gradients(model_chunks, num_tokens=None, **options) -> None:
    """megatron's `finalize_model_grads` without its division by tokens: the loss is already divided by Z."""
    finalize_model_grads(model_chunks, None, **options)


def _member_of(ids: set[int]):
    return lambda parameter: id(parameter) in ids


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
