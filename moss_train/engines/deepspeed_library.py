"""DeepSpeed as this package uses it: with our process groups, without compiling anything, without its own logging.

DeepSpeed is imported here and in `deepspeed_pipeline`, and only when an engine is set up with it.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from moss_train.engines.deepspeed_groups import OwnGroups
from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.groups import ParallelState


def initialize(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], state: ParallelState
) -> Any:
    """DeepSpeed's engine around `module`, with `settings` as its JSON. ConfigError when it is not installed."""
    library = load()
    _attach(library)
    _forget_modules()
    # It reads from the environment, then and later, which device is this process's; torchrun alone sets that.
    os.environ.setdefault("LOCAL_RANK", str(state.device.index or 0))
    # A pipeline's module brings its own.
    own_groups = OwnGroups(state) if state.pipeline_ranks == 1 else None
    # Its bfloat16 optimizer prints how much memory there is, group by group.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = library.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=own_groups, dist_init_required=False
        )
    return engine


def load() -> Any:
    """The package. ConfigError when it is not installed."""
    if not torch.cuda.is_available():
        # Otherwise it searches for accelerators, and warns when it finds none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.name=deepspeed: DeepSpeed cannot be imported ({error}); install it "
            "(DS_BUILD_OPS=0 pip install 'moss_train[deepspeed]'), or set engine.name=megatron"
        ) from error
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    if not torch.cuda.is_available():
        # It asks for instructions that multiply 16-bit numbers; PyTorch does without them.
        get_accelerator().is_fp16_supported = get_accelerator().is_bf16_supported = lambda: True
    logger.setLevel(logging.WARNING)  # at its usual level it tells of every buffer it makes
    # Said of every optimizer that is not of its own making.
    logger.addFilter(_is_news)
    # PyTorch's, of names that it has given new ones; once a call.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}. is deprecated", category=FutureWarning)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def _attach(library: Any) -> None:
    """Let DeepSpeed's communication run over the process group that exists."""
    from deepspeed import comm

    if comm.comm.cdb is not None:
        return
    # On a CPU its backend would compile a shared-memory all-reduce with the C++ compiler of this machine, and stop
    # where there is none.
    # By its full name: `deepspeed.comm.torch` as an attribute is PyTorch.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    library.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    groups.before_shutdown(_detach)


def _forget_modules() -> None:
    """ZeRO-3 numbers modules and parameters on through the life of a process, compares the numbers between processes,
    which may have had other engines before, and keeps hold of the last one's module. Only one engine lives at a time.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0


def _detach() -> None:
    """Forget process groups that are about to go; an engine set up later starts with those that exist then."""
    from deepspeed import comm
    from deepspeed.utils import groups as remembered

    remembered._release_process_group_references()
    comm.comm.cdb = None
