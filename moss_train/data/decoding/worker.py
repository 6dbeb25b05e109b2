"""The worker process: `python -m moss_train.data.decoding.worker [memory_mb]`, started by `pool.py`.

Protocol: one line of JSON, `{"ready": descriptor of shared memory, or null}`; then for each job one line of JSON on
standard input (its kind, itself, and whether the memory could be opened), answered by one line of JSON on standard
output. If that has `shape`, the pictures are in the shared memory that `descriptor` stands for, or follow as raw uint8.
The process ends with its input, so it never outlives the one that started it. It imports neither torch nor anything of
the training process.
"""

import importlib
import json
import os
import sys
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.pictures import allocate_with
from moss_train.data.decoding.shared import SharedArrays
from moss_train.errors import ConfigError, DataError, SampleError

#: kind of a job → module and class, imported when the first one comes
JOBS = {
    "decode": ("moss_train.data.decoding.job", "DecodeJob"),
    "describe": ("moss_train.data.decoding.describe", "DescribeJob"),
    "transcode": ("moss_train.data.shards.transcoder", "TranscodeJob"),
    "measure": ("moss_train.data.shards.measure", "MeasureJob"),
}


def answer(entry: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """The reply to one job: its header and, of decoded media, the pictures."""
    try:
        module, name = JOBS[entry["kind"]]
        done = getattr(importlib.import_module(module), name).from_json(entry["job"]).run()
        if not isinstance(done, DecodedArrays):
            return {"result": done.to_json()}, None
        header = {"shape": done.frames.shape, "backend": done.backend, "note": done.note}
        return header | {"times_s": done.times_s.tolist()}, done.frames
    except SampleError as error:
        cause = error.__cause__ or error
        return {"failed": "sample", "reason": error.reason, "exception": type(cause).__name__}, None
    except MemoryError:
        return {
            "failed": "sample",
            "reason": "it needs more memory than allowed (decode_memory_mb)",
            "exception": "MemoryError",
        }, None
    except (DataError, ConfigError) as error:
        return {"failed": "data" if isinstance(error, DataError) else "config", "reason": str(error)}, None


def serve(jobs: BinaryIO, replies: BinaryIO, most_bytes: int | None = None) -> None:
    """Answer jobs until the input ends. most_bytes: of the pictures of one job."""
    shared = SharedArrays(most_bytes)
    probe = shared.descriptor(shared.shared((1,))) if hasattr(os, "memfd_create") else None
    replies.write(json.dumps({"ready": probe}).encode() + b"\n")
    replies.flush()
    for line in jobs:
        entry = json.loads(line)
        shared.release()  # whoever asks has mapped what it was given before
        allocate_with(shared.empty if entry["shared"] else partial(np.empty, dtype=np.uint8))
        header, frames = answer(entry)
        descriptor = shared.descriptor(frames) if frames is not None else None
        if descriptor is not None:
            header["descriptor"] = descriptor
        replies.write(json.dumps(header).encode() + b"\n")
        if frames is not None and descriptor is None:
            replies.write(np.ascontiguousarray(frames).data)
        replies.flush()
        del frames  # or they would be held while the next are decoded


def limit_memory(memory_mb: int) -> None:
    """Let allocations beyond `memory_mb` MiB fail in this process, so that no sample takes the machine's memory."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))


def main() -> None:
    memory_mb = int(sys.argv[1]) if len(sys.argv) > 1 else None
    if memory_mb is not None:
        limit_memory(memory_mb)
    # Decoders may print; the reply channel must carry replies only.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, replies, None if memory_mb is None else memory_mb << 20)
    except BrokenPipeError:
        # The training process is gone. Closing must not raise the same again.
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
