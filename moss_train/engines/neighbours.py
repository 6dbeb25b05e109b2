"""Messages between pipeline stages, told to whoever watches: while this process waits for a neighbour it is in p2p."""

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from moss_train.parallel.phases import phase


class Neighbours(P2PCommunicator):
    """Megatron's communicator; nothing that is sent or received differs."""

    def _communicate(self, **arguments: Any) -> tuple:
        with phase("p2p"):
            before, after, requests = super()._communicate(**arguments)
        if isinstance(requests, dict):  # not waited for: `layout.overlap_p2p`
            requests = {name: _Request(request) for name, request in requests.items()}
        return before, after, requests


class _Request:
    """A message under way."""

    def __init__(self, request: dist.Work):
        self._request = request

    def wait(self) -> None:
        with phase("p2p"):
            self._request.wait()


def watched_messages(config: Any) -> dict[str, Any]:
    """What a schedule must be given so that its messages are watched: the communicator, and the groups that it would
    have chosen without one."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return {"p2p_communicator": Neighbours(groups.pp, config), "pg_collection": groups}
