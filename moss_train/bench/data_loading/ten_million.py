"""An index of millions of samples, written as `data index` writes it, and how long and large it is to open."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from moss_train.data.config import MODALITIES
from moss_train.data.shards.index import BATCH_ROWS, INDEX_NAME, write_index
from moss_train.data.shards.index_rows import (
    KINDS,
    ROWS,
    IndexTotals,
    ShardFacts,
    coded,
    key_hash,
    planning_digest,
)
from moss_train.errors import DataError

SAMPLES, SHARD_SAMPLES = 10_000_000, 2_000
#: what a process does that opens an index and nothing else
_OPEN = """
import json, sys, time
import numpy as np
from moss_train.data.shards.index import open_index
from pathlib import Path
def resident():
    # all, and without mapped files, in GB
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon")))
    return [int(lines[name].split()[0]) / 1e6 for name in ("VmRSS", "RssAnon")]
began = time.perf_counter()
index = open_index(Path(sys.argv[1]), "")
opened, resident_open = time.perf_counter() - began, resident()
shares = [int((index.modalities == code).sum()) for code in range(3)]
began = time.perf_counter()
numbers = np.random.default_rng(0).integers(0, len(index), 2000)
entries = [index.sample(int(number)) for number in numbers]
per_sample = (time.perf_counter() - began) / len(numbers)
began = time.perf_counter()
found = index.number(entries[7].key)
assert found == numbers[7]
print(json.dumps({
    "samples": len(index), "open_s": opened, "modalities": shares, "sample_s": per_sample,
    "first_number_s": time.perf_counter() - began,
    "resident_open_gb": resident_open, "resident_used_gb": resident(),
}))
"""


@dataclass(frozen=True)
class Opened:
    """How an index opened in a process of its own."""

    samples: int
    seconds: float
    resident_gb: float  #: of the process once it is open; 10⁹ bytes
    own_used_gb: float  #: after 2,000 samples and one key were looked up, without pages of the file
    sample_s: float  #: of looking up one sample by number
    modalities: list[int]


def open_ten_million(folder: Path, say: Callable[[str], None], samples: int = SAMPLES) -> Opened:
    """Write the index below `folder` and open it. Raises DataError when it does not open."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / INDEX_NAME
    try:
        _write(path, samples)
        size = path.stat().st_size / 1e9
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        command = [sys.executable, "-c", _OPEN, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        shutil.rmtree(folder)  # gigabytes
    if done.returncode:
        raise DataError(f"the index of {samples:,} samples does not open: {done.stderr.strip()[-500:]}")
    told = json.loads(done.stdout)
    say(f"index of {samples:,} samples, {size:.2f} GB: {told}")
    return Opened(
        told["samples"],
        told["open_s"],
        told["resident_open_gb"][0],
        told["resident_used_gb"][1],
        told["sample_s"],
        told["modalities"],
    )


def _write(path: Path, samples: int) -> None:
    shards = [
        ShardFacts(f"shard-{number:06d}.tar", SHARD_SAMPLES * 4096, 0, "0" * 64, SHARD_SAMPLES)
        for number in range(samples // SHARD_SAMPLES)
    ]
    numbers = np.arange(samples, dtype=np.int32) // SHARD_SAMPLES
    kinds = np.full(samples, KINDS.index("stream"), np.int8)
    modalities = np.full(samples, MODALITIES.index("video"), np.int8)
    batches = (_rows(first, min(BATCH_ROWS, samples - first)) for first in range(0, samples, BATCH_ROWS))
    planning = planning_digest(numbers, kinds, modalities)
    write_index(path, shards, batches, IndexTotals({"stream": samples}), ["0"], planning)


def _rows(first: int, count: int) -> pa.RecordBatch:
    """Samples of a JSON and a clip each, as `data index` writes them."""
    numbers = np.arange(first, first + count)
    keys = [f"part-{number // SHARD_SAMPLES:05d}/clip-{number:08d}" for number in numbers]
    rng = np.random.default_rng(first)
    members = ROWS.field("members").type.value_type
    places = np.repeat(numbers % SHARD_SAMPLES * 4096, 2) + np.tile([512, 1536], count)
    offsets = pa.array(np.arange(0, 2 * count + 1, 2), pa.int32())
    member = pa.StructArray.from_arrays(
        [
            pa.array(np.tile(["json", "mp4"], count)),
            pa.array(places),
            pa.array(np.tile([900, 2500], count)),
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 2 * count, [None, pa.py_buffer(rng.bytes(32 * count))]),
        ],
        fields=list(members),
    )
    medium = ROWS.field("media").type.value_type
    facts = {"member": "mp4", "fault": None, "container": "mp4", "codec": "h264", "duration_s": 30.0}
    plain = {pa.int64(): 640, pa.float64(): 25.0, pa.bool_(): True}
    media = pa.StructArray.from_arrays(
        [
            pa.nulls(count, entry.type)
            if entry.name == "fault"
            else pa.repeat(pa.scalar(facts.get(entry.name, plain.get(entry.type, "")), entry.type), count)
            for entry in medium
        ],
        fields=list(medium),
    )
    return pa.RecordBatch.from_arrays(
        [
            pa.array(keys, pa.string()),
            pa.array([key_hash(key) for key in keys], pa.uint64()),
            pa.array(numbers // SHARD_SAMPLES, pa.int32()),
            coded(np.full(count, KINDS.index("stream"), np.int8), KINDS),
            coded(np.full(count, MODALITIES.index("video"), np.int8), MODALITIES),
            pa.ListArray.from_arrays(offsets, member),
            pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), media),
            pa.array(np.full(count, 100), pa.int32()),
        ],
        schema=ROWS,
    )
