"""How much memory a training step takes: live tensor bytes, their peak, and what the forward pass leaves behind.

On a CPU, torch counts nothing, and the resident set of a process holds freed pages, libraries and what it shares with
the process it was forked from. `LiveTensors` therefore follows every storage that an operator returns until it is
freed. On CUDA the allocator's own figures are taken.
"""

import collections
import contextlib
import gc
import resource
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of one step on one process."""

    before: int  #: live when the step began: weights, gradient buffers, optimizer state, the batch
    peak: int  #: most that was live at one time
    after: int  #: live when it ended
    activations: int  #: most that forward passes had added to `before` when a backward pass began; 0 without one
    rss: int  #: largest resident set of the process during the step (of its whole life where Linux's /proc is missing)

    @property
    def added(self) -> int:
        """What the step needed beyond what was there already."""
        return self.peak - self.before


def measure_step(step: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, MemoryFigures]:
    """Run `step` once and say what memory it took; its result is what it would be without.

    On a CPU every operator passes through Python meanwhile, which costs some ten microseconds each: measure one step,
    not every one.
    """
    tracker: Tracker = CudaMemory(device) if torch.device(device).type == "cuda" else LiveTensors()
    gc.collect()  # garbage that happens to be freed during the step would be subtracted from what it takes
    with ResidentSet() as resident, tracker, ActivationMemory(tracker) as activations:
        before = tracker.current
        result = step()
        after = tracker.current
        figures = (before, tracker.peak, after, activations.bytes)
    return result, MemoryFigures(*figures, rss=resident.peak)


class Tracker(Protocol):
    """Counts the bytes of live tensors of one kind of device while it is entered."""

    @property
    def current(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def __enter__(self): ...

    def __exit__(self, *exception): ...


class LiveTensors(TorchDispatchMode):
    """Bytes of live tensor storages, now and at their peak, while it is entered; all devices but meta.

    Each storage counts once, with the bytes it asked for, however many views it has; those that exist already are
    found through the garbage collector. Operators are seen wherever they run: under no_grad, in backward passes, in
    recomputation. Unseen are the workspaces that a kernel frees before it returns.
    """

    def __init__(self):
        super().__init__()
        self._known: dict[int, tuple[weakref.ref, int]] = {}  # address → storage, bytes counted for it
        # Storages die anywhere, also amid an update of the sum; the deque takes note, `_settle` counts.
        self._freed: collections.deque[tuple[int, weakref.ref]] = collections.deque()
        self._current = 0
        self._peak = 0

    @property
    def current(self) -> int:
        """Bytes live now."""
        self._settle()
        return self._current

    @property
    def peak(self) -> int:
        """Most bytes live at one time since it was entered."""
        return self._peak

    def __enter__(self):
        self._known, self._current = {}, 0
        self._freed.clear()
        for tensor in _existing_tensors():
            self._count(tensor)
        self._settle()
        self._peak = self._current
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._counted_resize()  # no operator, hence unseen by a dispatch mode
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An operand not seen yet was made outside of torch's operators (from numpy, from a file, in another process).
        self._count_all((args, kwargs))
        result = function(*args, **kwargs)
        self._count_all(result)
        return result

    def _count_all(self, values) -> None:
        self._settle()
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self._count(value)
        self._peak = max(self._peak, self._current)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        address, size = storage._cdata, storage.nbytes()
        known = self._known.get(address)
        if known is not None:
            reference, counted = known
            self._current -= counted
            if reference() is storage:
                self._known[address] = (reference, size)
                self._current += size
                return
        freed = self._freed
        reference = weakref.ref(storage, lambda dead: freed.append((address, dead)))
        self._known[address] = (reference, size)
        self._current += size

    def _settle(self) -> None:
        while self._freed:
            address, reference = self._freed.popleft()
            known = self._known.get(address)
            # An address may have been given to a new storage meanwhile, which `_count` has put in the old one's place.
            if known is not None and known[0] is reference:
                self._current -= known[1]
                del self._known[address]

    def _counted_resize(self):
        resize = self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            known = self._known.get(storage._cdata)
            if known is not None and known[0]() is storage:
                self._settle()
                self._current += size - known[1]
                self._known[storage._cdata] = (known[0], size)
                self._peak = max(self._peak, self._current)

        return resize_


class CudaMemory:
    """Bytes of tensors on one CUDA device as torch's allocator counts them, rounded up to its blocks."""

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)

    @property
    def current(self) -> int:
        """Bytes live now."""
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        """Most bytes live at one time since it was entered."""
        return torch.cuda.max_memory_allocated(self._device)

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception):
        pass


class ActivationMemory:
    """Bytes that forward passes left for backward passes: the most that was live when a backward pass began, beyond
    what was live when this was entered.

    In a pipeline several microbatches wait for their backward pass at a time; all of them count, since their forward
    passes ran before. Backward passes inside a backward pass (recomputation) do not: what they find is a mixture.
    """

    def __init__(self, tracker: Tracker):
        self._tracker = tracker
        self._engine = torch.autograd.Variable._execution_engine
        self._depth = 0
        self._before = 0
        self.bytes = 0

    def __enter__(self):
        self._before = self._tracker.current
        self.bytes = 0
        self._engine = torch.autograd.Variable._execution_engine
        # Every way into a backward pass leads through here: Tensor.backward, autograd.grad and megatron's own.
        torch.autograd.Variable._execution_engine = self
        return self

    def __exit__(self, *exception):
        torch.autograd.Variable._execution_engine = self._engine

    def run_backward(self, *args, **kwargs):
        """Stands in for torch's autograd engine: takes note, and calls it."""
        if self._depth == 0:
            self.bytes = max(self.bytes, self._tracker.current - self._before)
        self._depth += 1
        try:
            return self._engine.run_backward(*args, **kwargs)
        finally:
            self._depth -= 1

    def __getattr__(self, name):
        return getattr(self._engine, name)


class ResidentSet:
    """The largest resident set of this process while it is entered, in bytes."""

    def __enter__(self):
        self.peak = 0
        # Linux forgets the peak when told to; without /proc the peak of the process's whole life must do.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception):
        self.peak = _resident_peak()


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _existing_tensors() -> Iterator[torch.Tensor]:
    """Tensors that Python knows, and their gradients, which it may not know."""
    for value in gc.get_objects():
        # Not isinstance: it asks proxies for their class, and some of them answer by importing a library.
        if issubclass(type(value), torch.Tensor):
            yield value
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns whoever asks a result for its gradient
                gradient = value.grad
            if gradient is not None:
                yield gradient


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage; None where it has none of its own, or none in memory."""
    if tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # wrappers around other tensors, functorch's for one
        return None
    return None if storage.device.type == "meta" else storage
