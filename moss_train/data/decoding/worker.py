"""The decoder process: `python -m moss_train.data.decoding.worker`, started by `decode_pool`.

Protocol: `ready` and a newline once; then for each job one line of JSON on standard input, answered by one line of
JSON on standard output and, if that has `shape`, the pictures as raw uint8. The process ends with its input, so it
never outlives the training process. It imports neither torch nor anything of the training process.
"""

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from moss_train.data.decoding.job import DecodeJob, run_job
from moss_train.errors import ConfigError, DataError, SampleError


def answer(line: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
    """The reply to one job line: its header and the pictures, None when the job failed."""
    try:
        decoded = run_job(DecodeJob.from_json(json.loads(line)))
    except SampleError as error:
        cause = error.__cause__ or error
        return {"failed": "sample", "reason": error.reason, "exception": type(cause).__name__}, None
    except (DataError, ConfigError) as error:
        return {"failed": "data" if isinstance(error, DataError) else "config", "reason": str(error)}, None
    header = {"shape": decoded.frames.shape, "backend": decoded.backend, "note": decoded.note}
    return header | {"times_s": decoded.times_s.tolist()}, decoded.frames


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


def main() -> None:
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
