"""What the index wants to know of one member of a shard: its digest, and what it is when one looks into it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from moss_train.data.decoding.job import DIGEST_BYTES, digest_of, read_range
from moss_train.data.decoding.probe import MediaProbe, probe_media
from moss_train.errors import SampleError

if TYPE_CHECKING:
    from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class DescribeJob:
    """One member, which is bytes `offset … offset + size` of a shard."""

    KIND: ClassVar[str] = "describe"
    WHAT: ClassVar[str] = "the probe"

    key: str
    shard: str  #: path or URL
    offset: int
    size: int
    type: str  #: "json" (a sample's), "medium", or "other", whose bytes are only digested
    max_pixels: int
    tokenizer: str | None  #: file of `save_tokenizer` that counts the texts of a JSON member; None: not counted
    shard_size: int | None = None  #: bytes of the whole shard

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "DescribeJob":
        return DescribeJob(**entry)

    def run(self) -> "Described":
        """A broken member is described as such; raises DataError when the shard cannot be read."""
        if self.type == "other":
            with Path(self.shard).open("rb") as raw:
                return Described(digest_of_range(raw, self.offset, self.size))
        data = read_range(Path(self.shard), self.offset, self.size)
        digest = digest_of(data)
        if self.type == "json":
            return Described(digest, schema=_schema_of(data), text_tokens=_text_tokens(self, data))
        try:
            return Described(digest, media=probe_media(data, self.key, self.max_pixels))
        except SampleError as error:
            return Described(digest, fault=error.reason)

    def result(self, entry: Any) -> "Described":
        return Described.from_json(entry)


@dataclass(frozen=True)
class Described:
    """What was found."""

    digest: bytes
    media: MediaProbe | None = None  #: of a medium that can be read
    fault: str | None = None  #: why a medium cannot be read
    schema: str | None = None  #: what a JSON member says it is
    text_tokens: int | None = None  #: of all texts of a sound JSON member

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"digest": self.digest.hex()}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "Described":
        media = entry["media"]
        return Described(
            **entry
            | {"digest": bytes.fromhex(entry["digest"]), "media": MediaProbe(**media) if media is not None else None}
        )


def digest_of_range(raw: BinaryIO, offset: int, size: int) -> bytes:
    """`digest_of` a range of a file, which need not fit in memory."""
    digest = hashlib.sha256()
    raw.seek(offset)
    while size > 0 and (data := raw.read(min(size, 1 << 20))):
        digest.update(data)
        size -= len(data)
    return digest.digest()[:DIGEST_BYTES]


def save_tokenizer(tokenizer: "StreamTokenizer", path: Path) -> None:
    """Write a tokenizer to a file that processes of our own read again."""
    path.write_text(
        json.dumps([tokenizer.definition, asdict(tokenizer.special), tokenizer.vocabulary_size]), encoding="utf-8"
    )


@lru_cache(maxsize=4)
def read_tokenizer(path: str) -> "StreamTokenizer":
    """The tokenizer of a file that `save_tokenizer` wrote."""
    from moss_train.streams.tokenizer import SpecialTokens, StreamTokenizer

    definition, special, vocabulary_size = json.loads(Path(path).read_text(encoding="utf-8"))
    return StreamTokenizer(definition, SpecialTokens(**special), vocabulary_size)


def _schema_of(data: bytes) -> str | None:
    """The name of a sample's schema alone; whether the JSON is right is for the reader to find."""
    try:
        name = json.loads(data).get("schema")
    except (ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _text_tokens(job: DescribeJob, data: bytes) -> int | None:
    if job.tokenizer is None:
        return None
    from moss_train.streams.schema import parse_sample

    try:
        sample = parse_sample(data, job.key)
    except SampleError:
        return None
    tokenizer = read_tokenizer(job.tokenizer)
    texts = [getattr(sample, name, None) for name in ("system", "prompt", "text")]
    texts += [message.content for message in getattr(sample, "messages", ())]
    texts += [getattr(event, "text", None) for event in getattr(sample, "events", ())]
    return sum(len(tokenizer.encode(text)) for text in texts if text)
