"""One piece of decoding work, as a value that crosses to a decoder process: which bytes, which moments, how large."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from moss_train.data.decoding.decode import DecodedArrays, DecodeLimits, decode_arrays
from moss_train.data.decoding.probe import MediaProbe
from moss_train.errors import DataError, SampleError

#: bytes of a member's digest, the first of its SHA-256
DIGEST_BYTES = 16


class Shards(Protocol):
    """Where local copies of shards come from; `moss_train.data.shards.storage` has the real one."""

    def held(self, location: str, size: int | None = None) -> AbstractContextManager[Path]: ...

    def prefetch(self, location: str, size: int | None = None) -> None: ...


class Job(Protocol):
    """Work for a process of its own; `worker.py` lists the kinds."""

    KIND: ClassVar[str]  #: by which the process knows it
    WHAT: ClassVar[str]  #: what is said to have failed or taken too long
    key: str  #: of the sample, for errors
    shard: str  #: path or URL
    shard_size: int | None  #: bytes of the whole shard, where it is known

    def to_json(self) -> dict[str, Any]: ...

    def run(self) -> Any:
        """Do it here; the shard must be a local path."""

    def result(self, entry: Any) -> Any:
        """What `run` gave elsewhere, from its JSON."""


@dataclass(frozen=True)
class DecodeJob:
    """Pictures of one medium, which is bytes `offset … offset + size` of a shard."""

    KIND: ClassVar[str] = "decode"
    WHAT: ClassVar[str] = "decoding"

    key: str
    shard: str  #: path or URL
    offset: int
    size: int
    digest: bytes  #: of the medium's bytes, as `digest_of` gives it
    times_s: tuple[float, ...]
    image_size: int | None
    decoder: str
    facts: MediaProbe | None
    limits: DecodeLimits
    shard_size: int | None = None  #: bytes of the whole shard, where it is known

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"digest": self.digest.hex()}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "DecodeJob":
        facts = entry["facts"]
        return DecodeJob(
            **entry
            | {
                "digest": bytes.fromhex(entry["digest"]),
                "times_s": tuple(entry["times_s"]),
                "facts": MediaProbe(**facts) if facts is not None else None,
                "limits": DecodeLimits(**entry["limits"]),
            }
        )

    def run(self) -> DecodedArrays:
        data = read_member(self.key, Path(self.shard), self.offset, self.size, self.digest)
        return decode_arrays(data, self.times_s, self.image_size, self.decoder, self.key, self.facts, self.limits)


def run_job(job: Any, store: Shards | None = None) -> Any:
    """Do a job in this process; `store` fetches remote shards.

    Raises SampleError for bad media, DataError for unreadable shards.
    """
    with nullcontext(job.shard) if store is None else store.held(job.shard, job.shard_size) as path:
        return replace(job, shard=str(path)).run()


def read_member(key: str, shard: Path, offset: int, size: int, digest: bytes) -> bytes:
    """A member's bytes; SampleError when they are not those that were indexed."""
    data = read_range(shard, offset, size)
    check_digest(key, data, digest)
    return data


def check_digest(key: str, data: bytes, digest: bytes) -> None:
    """Raise SampleError unless `data` has the digest that the index gives."""
    if digest_of(data) != digest:
        raise SampleError(key, "its bytes differ from those that were indexed; index the source again")


def digest_of(data: bytes) -> bytes:
    """What the index keeps of a member's bytes."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


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
