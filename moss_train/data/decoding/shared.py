"""Pictures in memory that two processes map: what a worker decodes, the process that asked for it reads in place.

The worker keeps the descriptor of such memory open until its next job; by then the other process has mapped it, and the
memory lives as long as an array of either process does. Only Linux has such memory without a name on a file system
(whose size containers often bound); elsewhere pictures go through the pipe.
"""

import mmap
import os
from math import prod

import numpy as np


class SharedArrays:
    """The worker's side: gives out arrays, and the descriptors of those that were last given."""

    def __init__(self, most_bytes: int | None = None):
        """most_bytes: of one array; shared memory does not count as the process's own, so it needs its own bound."""
        self._most = most_bytes
        self._descriptors: dict[int, tuple[np.ndarray, int]] = {}

    @staticmethod
    def possible() -> bool:
        return hasattr(os, "memfd_create")

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of that shape, all zeros. Raises MemoryError beyond the bound."""
        size = prod(shape)
        if size == 0:
            return np.empty(shape, np.uint8)
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
        """Of the memory of an array that `empty` gave, if this is that array, whole."""
        found = self._descriptors.get(id(array))
        return found[1] if found is not None else None

    def release(self) -> None:
        """Close the descriptors; nobody can map the arrays any more who has not yet."""
        for _, descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def map_array(process: int, descriptor: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8, the array that process has given a descriptor of. Raises OSError when its memory cannot be opened."""
    with open(f"/proc/{process}/fd/{descriptor}", "r+b", buffering=0) as memory:
        return np.frombuffer(mmap.mmap(memory.fileno(), prod(shape)), np.uint8).reshape(shape)
