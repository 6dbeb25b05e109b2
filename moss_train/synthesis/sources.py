"""Where captions come from: public annotations, samples of our own, rendered clips.

Every source gives, for each of its videos, a key and a timeline of captions with the bytes of the video, or the reason
why it has none.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.data.convert import annotation_files, annotation_rows, media_by_name, resolve_medium, videos_by_stem
from moss_train.data.shards.pack_input import Piece, find_samples, read_sample
from moss_train.data.shards.storage import ShardStore
from moss_train.data.synthetic.render import CAPTIONS_SUFFIX
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.importers.common import ImportContext, describe_media
from moss_train.streams.importers.dense_captions import activitynet_captions, activitynet_rows
from moss_train.streams.importers.formats import FORMATS, Format
from moss_train.streams.schema import Reply, Sample, StreamSample
from moss_train.synthesis.captions import Caption, CaptionTimeline

#: forms of annotation files whose videos are described at times
ANNOTATED = ("activitynet", "coin", "ego4d", "videollm_online", "text_stream", "streamo", "moss")
SOURCES = ("rendered", "samples", *ANNOTATED)
_SENTENCE_END = re.compile(r"[.!?]['\"”’)]*$")
#: a pause after which the words of a commentary are another caption
_PAUSE_S = 2.0


@dataclass(frozen=True)
class Footage:
    """One video with its captions."""

    timeline: CaptionTimeline
    medium: dict  #: entry of the sample's `media`
    video: Path | Piece  #: a file, or a member of a staging folder or shard


#: a key with its video, or with the reason why the row gives none
Found = tuple[str, Footage | SampleError]


@dataclass(frozen=True)
class Where:
    """What a source is read from; the fields of `data synth` of the same names."""

    source: str
    captions: str | None
    path: str | None
    media_root: str | None
    fps: float
    seen_at: float

    def validate(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"source={self.source!r} is unknown; use one of {', '.join(SOURCES)}")
        needed = ("path",) if self.source in ("rendered", "samples") else ("captions", "media_root")
        for name in ("captions", "path", "media_root"):
            given = getattr(self, name) is not None
            if name in needed and not given:
                raise ConfigError(f"source={self.source} needs {name}=…")
            if given and name not in needed and not (name == "captions" and self.source == "rendered"):
                raise ConfigError(f"{name}= has no meaning for source={self.source}; it takes {' and '.join(needed)}")


def find_footage(where: Where, store: ShardStore) -> list[Found]:
    """All videos of a source, in the order of their keys. Raises DataError when the source cannot be read."""
    where.validate()
    if where.source == "rendered":
        found = _rendered(where)
    elif where.source == "samples":
        assert where.path is not None
        found = _samples(where.path, store)
    else:
        found = _annotated(where)
    listed = sorted(found, key=lambda entry: entry[0])
    if not listed:
        raise DataError(f"{where.path or where.captions} holds no video with captions")
    return listed


def _rendered(where: Where) -> Iterator[Found]:
    """Clips of `data render` with the captions that stand beside their folder."""
    folder = Path(where.path or "")
    if not folder.is_dir():
        raise DataError(f"path={folder} is not a folder; give a source of `data render`, such as clips/train/realtime")
    file = Path(where.captions) if where.captions else folder.with_name(folder.resolve().name + CAPTIONS_SUFFIX)
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: rendered before captions were written, or not by `data render`; "
            "run `moss-train data render` again, or name the file with captions="
        )
    try:
        entries = dict(activitynet_rows(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, SampleError) as error:
        raise DataError(f"{file} is no file of captions: {getattr(error, 'reason', error)}") from error
    for key, entry in entries.items():
        try:
            duration_s, spans = activitynet_captions((key, entry), key)
            path = folder / f"{key}.mp4"
            if not path.is_file():
                raise SampleError(key, f"{path} is missing")
            medium = {"id": "v0", "kind": "video", "member": "mp4", "duration_s": duration_s}
            # what a clip shows is plain as soon as it is shown
            captions = [Caption(span.span[0], min(span.span[1], duration_s), span.text, span.span[0]) for span in spans]
            yield key, Footage(CaptionTimeline.of(key, duration_s, captions, states=True), medium, path)
        except SampleError as error:
            yield key, error


def _annotated(where: Where) -> Iterator[Found]:
    assert where.captions is not None and where.media_root is not None
    media = media_by_name(Path(where.media_root))
    context = ImportContext(where.fps, videos_by_stem(media))
    form = FORMATS[where.source]
    if where.source == "activitynet":
        form = Format(_activitynet_reader(where.seen_at), activitynet_rows)
    for key, row in annotation_rows(annotation_files(Path(where.captions)), where.source, form, context):
        try:
            if isinstance(row, SampleError):
                raise row
            read, members = row()
            timeline = read if isinstance(read, CaptionTimeline) else timeline_of(read, key)
            ((member, listed),) = members.items()
            medium = {"id": "v0", "kind": "video", "member": member}
            yield key, Footage(timeline, medium, resolve_medium(key, listed, media))
        except SampleError as error:
            yield key, error


def _activitynet_reader(seen_at: float) -> Callable[[Any, str, ImportContext], tuple[CaptionTimeline, dict]]:
    def read(row: tuple[str, Any], key: str, context: ImportContext) -> tuple[CaptionTimeline, dict]:
        duration_s, spans = activitynet_captions(row, key)
        captions = []
        for span in spans:
            start_s, end_s = span.span[0], min(span.span[1], duration_s)
            captions.append(Caption(start_s, end_s, span.text, start_s + seen_at * (end_s - start_s)))
        _, members = describe_media([("video", context.video(row[0], key))], key)
        return CaptionTimeline.of(key, duration_s, captions), members

    return read


def _samples(path: str, store: ShardStore) -> Iterator[Found]:
    """Samples of a staging folder or of shards: of streams, what is said is a caption of what has been seen by then."""
    for key, pieces in find_samples(path, store).items():
        try:
            _, sample = read_sample(key, pieces, store)
            timeline = timeline_of(sample, key)
            medium = sample.media[0]
            entry = {"id": medium.id, "kind": "video", "member": medium.member}
            if medium.duration_s is not None:
                entry["duration_s"] = medium.duration_s
            yield key, Footage(timeline, entry, pieces[medium.member])
        except SampleError as error:
            yield key, error


def timeline_of(sample: Sample, key: str) -> CaptionTimeline:
    """The replies of a stream as captions, each known from the moment at which it was said.

    A reply with exact times is taken apart into sentences, and where it pauses. Raises SampleError for samples that are
    no streams (their texts have no times) and for streams in which nothing is said.
    """
    if not isinstance(sample, StreamSample):
        raise SampleError(key, f"a {sample.schema_name.split('/')[1].split('@')[0]} says no times; use streams")
    captions = [
        caption for event in sample.events if isinstance(event, Reply) and not event.stale for caption in _spoken(event)
    ]
    if not captions:
        raise SampleError(key, "nothing is said in it, so it describes nothing")
    return CaptionTimeline.of(key, sample.sampling.end_s, captions, start_s=sample.sampling.start_s)


def _spoken(reply: Reply) -> Iterator[Caption]:
    """The captions that a reply holds."""
    if reply.words is None and reply.chunks is None:
        start_s, end_s = reply.evidence or (reply.t, reply.t)
        yield Caption(start_s, max(start_s, min(end_s, reply.t)), reply.text, reply.t)
        return
    if reply.words is not None:
        parts = [(start_s, " " + word.strip()) for start_s, _, word in reply.words]
    else:
        parts = list(reply.chunks or [])
    held: list[tuple[float, str]] = []
    for (time_s, text), following in zip(parts, [*parts[1:], None], strict=True):
        held.append((time_s, text))
        broken_off = following is None and not reply.complete
        paused = not broken_off and (following is None or following[0] - time_s > _PAUSE_S)
        if paused or _SENTENCE_END.search(text.strip()):
            whole = " ".join("".join(part for _, part in held).split())
            if whole:
                yield Caption(held[0][0], time_s, whole, time_s)
            held = []
