"""Videos with timed descriptions: ActivityNet Captions and COIN. One sample a video, watched from its start.

An opening question says what is wanted; each description is a reply to it. Silence between them is right, since both
annotate a video throughout.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moss_train.streams.importers.common import (
    ImportContext,
    Imported,
    dict_of,
    list_of,
    require,
    seconds_of,
    span_of,
    text_of,
)
from moss_train.streams.importers.talk import Saying, Watch, hold_talk, stream_of

TELL_EVENTS = "Tell me what happened whenever something is over."
TELL_STEPS = "I am about to {task}. Tell me each step when I begin it."
#: COIN's task names run their words together; these runs of capitals are one word
_CAPITALS = re.compile(r"[A-Z]{2,}\d*(?![a-z])|[A-Z][a-z]*|[a-z]+|\d+")


def activitynet_rows(loaded: Any) -> Iterator[tuple[str, Any]]:
    """`{video: {"duration", "timestamps", "sentences"}}` as (video, entry) pairs."""
    yield from dict_of(loaded, "file", "the file").items()


@dataclass(frozen=True)
class SpanCaption:
    """A sentence and the span of the video that it describes; `where` is its field of the row."""

    span: tuple[float, float]  #: seconds; its end may lie beyond the video
    text: str
    where: str


def activitynet_captions(row: tuple[str, Any], key: str) -> tuple[float, list[SpanCaption]]:
    """Duration of a video in seconds and its captions, in the order of the row. A caption listed twice counts once.

    Raises SampleError for spans that start beyond the video or end before they start, and when there is no caption.
    """
    video, entry = row
    entry = dict_of(entry, key, video)
    duration_s = seconds_of(entry.get("duration"), key, f"{video}.duration")
    require(duration_s > 0, key, f"{video}.duration: is 0; mend the row")
    spans = list_of(entry.get("timestamps"), key, f"{video}.timestamps")
    sentences = list_of(entry.get("sentences"), key, f"{video}.sentences")
    require(len(spans) == len(sentences), key, f"{video}.timestamps: {len(spans)} for {len(sentences)} sentences")
    captions: dict[tuple, SpanCaption] = {}
    for index, (span, sentence) in enumerate(zip(spans, sentences, strict=True)):
        where = f"{video}.timestamps[{index}]"
        start_s, end_s = span_of(span, key, where)
        require(start_s < duration_s, key, f"{where}: starts at {start_s} s, the video ends at {duration_s} s")
        text = sentence_of(text_of(sentence, key, f"{video}.sentences[{index}]"), key, f"{video}.sentences[{index}]")
        captions.setdefault((start_s, end_s, text), SpanCaption((start_s, end_s), text, where))
    require(bool(captions), key, f"{video}.sentences: is empty; drop the row")
    return duration_s, list(captions.values())


def import_activitynet(row: tuple[str, Any], key: str, context: ImportContext) -> Imported:
    """One video. Each sentence is said when its span is over (clipped to the video); spans may overlap."""
    video = row[0]
    duration_s, captions = activitynet_captions(row, key)
    sayings = [Saying("user", 0.0, TELL_EVENTS, "")]
    for caption in captions:
        start_s, end_s = caption.span[0], min(caption.span[1], duration_s)
        sayings.append(Saying("assistant", end_s, caption.text, caption.where, (start_s, end_s)))
    watch = Watch(context.fps, 0.0, duration_s)
    metadata = {"format": "activitynet", "video": video, "duration": duration_s}
    return stream_of(key, context.video(video, key), watch, hold_talk(sayings, watch, key), metadata)


def coin_rows(loaded: Any) -> Iterator[tuple[str, Any]]:
    """`{"database": {video: {"class", "annotation": [{"segment", "label"}], …}}}` as (video, entry) pairs."""
    database = dict_of(loaded, "file", "the file").get("database")
    yield from dict_of(database, "file", "database").items()


def import_coin(row: tuple[str, Any], key: str, context: ImportContext) -> Imported:
    """One video, watched from `start` to `end` of the task. Each step is named at the first frame that shows it.

    A step with the label of the one before goes on with it: no reply. Raises SampleError for steps outside the task.
    """
    video, entry = row
    entry = dict_of(entry, key, video)
    task = " ".join(_task_words(text_of(entry.get("class"), key, f"{video}.class")))
    require(bool(task), key, f"{video}.class: is empty; name the task")
    duration_s = seconds_of(entry.get("duration"), key, f"{video}.duration")
    start_s = seconds_of(entry.get("start", 0.0), key, f"{video}.start")
    end_s = min(seconds_of(entry.get("end", duration_s), key, f"{video}.end"), duration_s)
    require(start_s < end_s, key, f"{video}.start: {start_s} s is not before the task's end at {end_s} s")
    steps = []
    for index, step in enumerate(list_of(entry.get("annotation"), key, f"{video}.annotation")):
        where = f"{video}.annotation[{index}]"
        step = dict_of(step, key, where)
        segment = span_of(step.get("segment"), key, f"{where}.segment")
        inside = segment[0] < end_s and segment[1] >= start_s
        require(inside, key, f"{where}.segment: {list(segment)} lies outside the task [{start_s}, {end_s}]")
        label = sentence_of(text_of(step.get("label"), key, f"{where}.label"), key, f"{where}.label")
        steps.append((segment, label, f"{where}.segment"))
    require(bool(steps), key, f"{video}.annotation: is empty; drop the row")
    sayings, last = [Saying("user", start_s, TELL_STEPS.format(task=task), "")], None
    for segment, label, where in sorted(steps, key=lambda step: step[0]):
        if label != last:
            begins_s = max(segment[0], start_s)
            sayings.append(Saying("assistant", begins_s, label, where, (begins_s, begins_s)))
        last = label
    watch = Watch(context.fps, start_s, end_s)
    metadata = {"format": "coin", "video": video, "duration": duration_s} | {
        name: entry[name] for name in ("class", "subset") if name in entry
    }
    return stream_of(key, context.video(video, key), watch, hold_talk(sayings, watch, key), metadata)


def _task_words(name: str) -> list[str]:
    """`PutOnHairExtensions` as put, on, hair, extensions; runs of capitals (`TV`, `CD`) stay as they are."""
    words = _CAPITALS.findall(name)
    return [word if len(word) > 1 and word.isupper() else word.lower() for word in words]


def sentence_of(text: str, key: str, where: str) -> str:
    """The text on one line, with a capital and a full stop."""
    text = " ".join(text.split())
    require(bool(text), key, f"{where}: is blank; drop it with its times")
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
