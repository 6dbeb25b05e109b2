"""ZeRO 3 from the first parameter on: each process keeps a run of every parameter, none ever the whole model."""

from collections.abc import Callable, Iterable

import torch

from moss_train.engines.config import EngineConfig
from moss_train.engines.deepspeed_library import is_shared, sharer
from moss_train.engines.deepspeed_settings import deepspeed_settings
from moss_train.engines.deepspeed_shards import own_run
from moss_train.model.precision import Precision
from moss_train.parallel.groups import ParallelState


class SharedParameters:
    """See `model.build.ParameterStore`."""

    def __init__(self, config: EngineConfig, state: ParallelState):
        self._config, self._state = config, state
        self._share_out: Callable[[list[torch.nn.Parameter]], None] | None = None

    def take(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Collective."""
        # One without elements is refused, by name, when the engine is set up.
        taken = [parameter for parameter in parameters if parameter.numel()]
        if self._share_out is None:
            dtype = taken[0].dtype
            precision = Precision.of(dtype, fp8=False).name
            settings = deepspeed_settings(self._config, self._state.layout, precision, clip=0.0)
            self._share_out = sharer(dtype, settings, self._state)
        self._share_out(taken)

    def fill(self, parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        """Each process copies its own run: nothing is sent."""
        if is_shared(parameter):
            start, end = own_run(parameter)
            parameter.ds_tensor[: end - start].copy_(weight.reshape(-1)[start:end])
