"""The worker process: `python -m moss_train.data.decoding.worker [memory_mb]`, started by `pool.py`.

Protocol: `ready` and a newline once; then for each job one line of JSON on standard input (its kind and itself),
answered by one line of JSON on standard output and, if that has `shape`, the pictures as raw uint8. The process ends
with its input, so it never outlives the one that started it. It imports neither torch nor anything of the training
process.
"""

import importlib
import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from moss_train.data.decoding.decode import DecodedArrays
from moss_train.errors import ConfigError, DataError, SampleError

#: kind of a job → module and class, imported when the first one comes
JOBS = {
    "decode": ("moss_train.data.decoding.job", "DecodeJob"),
    "describe": ("moss_train.data.decoding.describe", "DescribeJob"),
    "transcode": ("moss_train.data.shards.transcoder", "TranscodeJob"),
    "measure": ("moss_train.data.shards.measure", "MeasureJob"),
}


def answer(line: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
    """The reply to one job line: its header and, of decoded media, the pictures."""
    try:
        entry = json.loads(line)
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


def serve(jobs: BinaryIO, replies: BinaryIO) -> None:
    """Answer jobs until the input ends."""
    replies.write(b"ready\n")
    replies.flush()
    for line in jobs:
        header, frames = answer(line)
        replies.write(json.dumps(header).encode() + b"\n")
        if frames is not None:
            replies.write(np.ascontiguousarray(frames).data)
        replies.flush()


def limit_memory(memory_mb: int) -> None:
    """Let allocations beyond `memory_mb` MiB fail in this process, so that no sample takes the machine's memory."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))


def main() -> None:
    if len(sys.argv) > 1:
        limit_memory(int(sys.argv[1]))
    # Decoders may print; the reply channel must carry replies only.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, replies)
    except BrokenPipeError:
        # The training process is gone. Closing must not raise the same again.
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
