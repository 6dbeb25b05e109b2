"""One piece of decoding work, as a value that crosses to a decoder process: which bytes, which moments, how large."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moss_train.data.decoding.decode import DecodedArrays, DecodeLimits, decode_arrays
from moss_train.data.decoding.probe import MediaProbe
from moss_train.errors import DataError


@dataclass(frozen=True)
class DecodeJob:
    """Pictures of one medium, which is bytes `offset … offset + size` of a shard."""

    key: str
    path: str
    offset: int
    size: int
    times_s: tuple[float, ...]
    image_size: int | None
    decoder: str
    facts: MediaProbe | None
    max_pixels: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "DecodeJob":
        facts = entry["facts"]
        return DecodeJob(
            **entry | {"times_s": tuple(entry["times_s"]), "facts": MediaProbe(**facts) if facts is not None else None}
        )


def run_job(job: DecodeJob) -> DecodedArrays:
    """Read and decode; raises SampleError for bad media, DataError for unreadable shards."""
    data = read_range(Path(job.path), job.offset, job.size)
    limits = DecodeLimits(max_pixels=job.max_pixels)
    return decode_arrays(data, job.times_s, job.image_size, job.decoder, job.key, job.facts, limits)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a shard; DataError when they are not there."""
    try:
        with path.open("rb") as raw:
            raw.seek(offset)
            data = raw.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) != size:
        raise DataError(f"{path} is cut short: {size} bytes expected at {offset}, {len(data)} found")
    return data
