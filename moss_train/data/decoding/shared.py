"""Pictures in memory that two processes map: what a worker decodes, the process that asked for it reads in place.

The worker keeps the descriptor of such memory open until its next job; by then the other process has mapped it, and the
memory lives as long as an array of either process does. Only Linux has such memory without a name on a file system
(whose size containers often bound); elsewhere pictures go through the pipe.
"""

import mmap
import os
from collections.abc import Sequence
from math import prod

import numpy as np

#: smaller arrays are not worth a mapping of their own, of which a process may have some ten thousand
LEAST_BYTES = 1 << 20


class SharedArrays:
    """The worker's side: makes arrays, and tells the descriptors of those made since the last `release`."""

    def __init__(self, most_bytes: int | None = None):
        """most_bytes: of one array; shared memory does not count as the process's own, so it needs its own bound."""
        self._most = most_bytes
        self._descriptors: dict[int, tuple[np.ndarray, int]] = {}

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of that shape, shared when it is large. Raises MemoryError beyond the bound."""
        return np.empty(shape, np.uint8) if prod(shape) < LEAST_BYTES else self.shared(shape)

    def shared(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of that shape, all zeros, shared whatever its size."""
        size = prod(shape)
        if self._most is not None and size > self._most:
            raise MemoryError
        descriptor = os.memfd_create("pictures")
        try:
            os.ftruncate(descriptor, size)
            array = np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(shape)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors[id(array)] = array, descriptor
        return array

    def descriptor(self, array: np.ndarray) -> int | None:
        """Of the memory of an array, if it is one that was made to be shared."""
        found = self._descriptors.get(id(array))
        return found[1] if found is not None else None

    def release(self) -> None:
        """Close the descriptors; nobody can map the arrays any more who has not yet."""
        for _, descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def can_map(process: int, descriptor: int) -> bool:
    """Whether this process may open memory that another one has a descriptor of."""
    try:
        os.close(os.open(_path(process, descriptor), os.O_RDWR))
    except OSError:
        return False
    return True


def map_array(process: int, descriptor: int, shape: Sequence[int]) -> np.ndarray:
    """uint8, the array that process has given a descriptor of. Raises OSError when its memory cannot be opened."""
    import torch  # whose mappings, unlike Python's, keep no descriptor open as long as the array lives

    try:
        memory = torch.from_file(_path(process, descriptor), shared=True, size=prod(shape), dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return memory.numpy().reshape(shape)


def _path(process: int, descriptor: int) -> str:
    return f"/proc/{process}/fd/{descriptor}"
