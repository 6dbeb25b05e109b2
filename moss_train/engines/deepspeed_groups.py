"""Our process groups under the names by which DeepSpeed asks for them. None is made here.

Data-parallel, to DeepSpeed, are all processes that hold the same parameters, those that share frames included.
"""

import torch.distributed as dist

from moss_train.parallel.groups import ParallelState


class OwnGroups:
    """DeepSpeed's argument `mpu`, without pipeline stages: model-parallel are the tensor-parallel processes."""

    def __init__(self, state: ParallelState):
        self._tensor, self._data, self._model = state.tensor_group, state.data_frame_group, state.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_tensor_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)


class StageGroups(OwnGroups):
    """The grid of a DeepSpeed pipeline (its `PipelineParallelGrid`): model-parallel are the processes of one copy of
    the model, over all stages, for over them norms and overflows are agreed on."""

    def __init__(self, state: ParallelState):
        super().__init__(state)
        self._model, self._pipeline = state.model_group, state.pipeline_group
        self.data_parallel_size, self.data_parallel_id = self._data.size(), self._data.rank()
        self.pipe_parallel_size = self._pipeline.size()
        self.model_parallel_size = self._tensor.size()
        self.pp_group = dist.get_process_group_ranks(self._pipeline)

    def get_global_rank(self) -> int:
        return dist.get_rank()

    def get_stage_id(self) -> int:
        return self._pipeline.rank()

    def stage_to_global(self, stage_id: int) -> int:
        """The number of the process that is stage `stage_id` of this pipeline."""
        return self.pp_group[stage_id]

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._pipeline.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._pipeline.size()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._pipeline

    get_pipe_parallel_rank = get_pipeline_model_parallel_rank
    get_pipe_parallel_world_size = get_pipeline_model_parallel_world_size
    get_pipe_parallel_group = get_pipeline_model_parallel_group
