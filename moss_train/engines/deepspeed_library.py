"""DeepSpeed as this package uses it: with our process groups, without compiling anything, without its own logging.

DeepSpeed is imported here and in `deepspeed_pipeline`, and only when a run
is planned, or an engine set up, with it.
"""

import contextlib
import ctypes
import difflib
import gc
import importlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, get_args

import pydantic
import torch
import torch.distributed as dist

from moss_train.engines.deepspeed_groups import OwnGroups
from moss_train.engines.deepspeed_settings import fields_on_disk
from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.groups import ParallelState


def initialize(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], state: ParallelState
) -> Any:
    """DeepSpeed's engine around `module`, with `settings` as its JSON. ConfigError when it is not installed."""
    library = _prepared(settings, state)
    _forget_modules()
    if not any(map(is_shared, module.parameters())):
        _forget_parameters()
    # A pipeline's module brings its own.
    own_groups = OwnGroups(state) if state.pipeline_ranks == 1 else None
    # Its bfloat16 optimizer tells of the memory, group by group, and collects garbage each time.
    importlib.import_module("deepspeed.runtime.bf16_optimizer").see_memory_usage = lambda *_, **__: None
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = library.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=own_groups, dist_init_required=False
        )
    return engine


def remove_hooks(engine: Any) -> None:
    """Take an engine's hooks off its parameters. Its own `destroy` does more, and needs process groups, which may be
    gone when an engine ends."""
    for hook in getattr(engine.optimizer, "_grad_acc_hooks", ()):
        hook.remove()


def forget_gradients(zero: Any) -> None:
    """Drop what a step that overflowed has left. ZeRO 1 and 2 do so themselves unless optimizer state lies in
    the memory of the host: then later gradients would be added to the infinities."""
    if not hasattr(zero, "all_grad_tensors"):
        return
    for held in (zero.averaged_gradients, zero.all_grad_tensors):
        for group in held:
            held[group] = None


def sharer(
    dtype: torch.dtype, settings: dict[str, Any], state: ParallelState
) -> Callable[[list[torch.nn.Parameter]], None]:
    """What makes ZeRO 3 share out parameters of `dtype` over the data-parallel processes, each process keeping a run of
    each of them. Collective. For parameters of a module that `initialize` gets later, with the same settings."""
    library = _prepared(settings, state)
    _forget_modules()
    _forget_parameters()
    own_groups = OwnGroups(state)
    init = library.zero.Init(
        data_parallel_group=own_groups.get_data_parallel_group(),
        dtype=dtype,
        config_dict_or_path=settings,
        mpu=own_groups,
    )
    return init._convert_to_zero_parameters


def is_shared(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO 3 has shared a parameter out, so that this process holds a run of it."""
    return hasattr(parameter, "ds_id")


def require_deepspeed(settings: dict[str, Any]) -> None:
    """Raise ConfigError unless DeepSpeed can be imported, finds on this machine what `settings` need, and takes them.
    Makes nothing; process groups need not exist."""
    load()
    if on_disk := fields_on_disk(settings):
        _require_disk_access(on_disk[0])
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    _parse(DeepSpeedZeroConfig, settings["zero_optimization"], "zero_optimization")
    _parse(DeepSpeedBF16Config, settings.get("bf16", {}), "bf16")
    _parse(DeepSpeedFP16Config, settings.get("fp16", {}), "fp16")
    _parse(DeepSpeedThroughputTimerConfig, settings["timers"]["throughput"], "timers.throughput")


def _parse(section: type[pydantic.BaseModel], fields: dict[str, Any], path: str) -> None:
    """Have DeepSpeed read one section; ConfigError for the first of its fields that it does not take."""
    try:
        section(**fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (path, *first["loc"])))
        value = f"={first['input']!r}" if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"engine.deepspeed.{where}{value}: {_legal(section, first['loc'])}") from error
        # What a section as a whole is refused for begins with the field, if it is one's.
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").removeprefix(f"{path}.")
        name = reason.split()[0]
        if not first["loc"] and name in fields:
            where, value, reason = f"{path}.{name}", f"={fields[name]!r}", reason.removeprefix(name).lstrip()
        raise ConfigError(f"engine.deepspeed.{where}{value}: DeepSpeed says: {reason}; mend or remove it") from error
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"engine.deepspeed.{path}: DeepSpeed says: {error}; mend or remove it") from error


def _legal(section: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> str:
    """Which names DeepSpeed knows where it met one that it does not."""
    for step in location[:-1]:
        annotation = section.model_fields[str(step)].annotation
        section = next(one for one in (annotation, *get_args(annotation)) if isinstance(one, type))
    known = sorted(field.alias or name for name, field in section.model_fields.items())
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"DeepSpeed knows no such field; set {close[0]}" if close else f"legal names are {', '.join(known)}"


def _prepared(settings: dict[str, Any], state: ParallelState) -> Any:
    library = load()
    if on_disk := fields_on_disk(settings):
        _load_disk_access(on_disk[0])
    _attach(library)
    # It reads from the environment, then and later, which device is this process's; torchrun alone sets that.
    os.environ.setdefault("LOCAL_RANK", str(state.device.index or 0))
    return library


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
    logger.addFilter(_is_news)
    # PyTorch's, of names that it has given new ones; once a call.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}. is deprecated", category=FutureWarning)
    return deepspeed


def disk_access_problem() -> str | None:
    """What this machine lacks to compile DeepSpeed's `async_io`, which reads and writes what lies on a disk."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            return program
    return None if AsyncIOBuilder().is_compatible(verbose=False) else "libaio with its headers (Debian: libaio-dev)"


def _require_disk_access(field: str) -> None:
    if missing := disk_access_problem():
        raise ConfigError(f"{field}: DeepSpeed compiles async_io for it, which needs {missing}; install it, or set cpu")


def _load_disk_access(field: str) -> None:
    """The one part of DeepSpeed that is compiled: on the machine, when it is first wanted."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    _require_disk_access(field)
    if not torch.cuda.is_available():
        # Without CUDA it is not linked with what it needs.
        ctypes.CDLL("libaio.so.1", mode=ctypes.RTLD_GLOBAL)
    try:
        AsyncIOBuilder().load(verbose=False)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{field}: DeepSpeed's async_io cannot be compiled ({error}); set cpu") from error


def _is_news(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    # Said of every optimizer that is not of its own making; and what our own report of a step says.
    return not any(phrase in said for phrase in ("untested optimizer", "OVERFLOW!"))


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
    """ZeRO-3 numbers modules on through the life of a process, compares the numbers between processes, which may have
    had other engines before, and keeps hold of the last one's module. Only one engine lives at a time."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    # A cache of a method's results, whose keys are an engine's modules; it lies in the closure of another decorator.
    cached = coordinator._PartitionedParameterCoordinator__params_to_release
    while not hasattr(cached, "cache_clear"):
        cached = next(cell.cell_contents for cell in cached.__closure__ if callable(cell.cell_contents))
    cached.cache_clear()
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    gc.collect()  # that module lies in reference cycles


def _forget_parameters() -> None:
    """It numbers parameters in the same way."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.Init.param_id = 0


def _detach() -> None:
    """Forget process groups that are about to go; an engine set up later starts with those that exist then."""
    from deepspeed import comm
    from deepspeed.utils import groups as remembered

    remembered._release_process_group_references()
    comm.comm.cdb = None
