"""Videos narrated as they run: Ego4D narrations, and the narration streams of VideoLLM-online. One sample a pass.

A pass is what one annotator narrated of one video; two passes of a video say the same in other words, so they are not
mixed. Narrators do not describe everything, so silence is known to be right only between two close narrations.
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
    text_of,
)
from moss_train.streams.importers.talk import Saying, hold_talk, stream_of, watch_until

NARRATE = (
    "Narrate the video in real time, briefly. C is the person who wears the camera, other letters are other people."
)
#: silence between two narrations that are closer than this is taught
CLOSE_S = 10.0
#: who acts, the wearer or another person, and misspelt forms of it
_TAG = re.compile(r"[#@]\s*(?:[co]\b)?", re.IGNORECASE)
#: what the narrator could not make out
_UNSURE = re.compile(r"#\s*unsure\b", re.IGNORECASE)


@dataclass(frozen=True)
class NarrationPass:
    """All narrations of one annotator of one video, as they stand in the file."""

    format: str
    video: str
    name: str  #: of the pass
    narrations: Any
    time_field: str
    text_field: str


def ego4d_rows(loaded: Any) -> Iterator[NarrationPass]:
    """`narration.json`: `{video: {"narration_pass_1": {"narrations": [{"timestamp_sec", "narration_text"}]}, …}}`.

    A `videos` level above that, as in the redacted file, is passed through.
    """
    loaded = dict_of(loaded, "file", "the file")
    for video, entry in dict_of(loaded.get("videos", loaded), "file", "videos").items():
        entry = entry if isinstance(entry, dict) else {}
        passes = {name: of_pass for name, of_pass in entry.items() if name.startswith("narration_pass")}
        for name, of_pass in passes.items() or [("narration_pass_1", None)]:
            narrations = of_pass.get("narrations") if isinstance(of_pass, dict) else None
            yield NarrationPass("ego4d", video, name, narrations, "timestamp_sec", "narration_text")


def narration_stream_rows(loaded: dict) -> Iterator[NarrationPass]:
    """VideoLLM-online's `narration_stream_*.json`: `{video: {annotation: [{"time", "text"}]}}`."""
    for video, passes in loaded.items():
        for name, narrations in passes.items() if isinstance(passes, dict) else [("", None)]:
            yield NarrationPass("videollm_online", video, name, narrations, "time", "text")


def import_narrations(row: NarrationPass, key: str, context: ImportContext) -> Imported:
    """One pass, from the frame before its first narration to the frame of its last.

    Tags are stripped (`#unsure` becomes "something") and narrations sorted by time; those of less than two words, and
    those that repeat the one before, are left out and counted in `source_metadata.left_out`.
    """
    where = f"{row.video}.{row.name}"
    narrations = []
    for index, entry in enumerate(list_of(row.narrations, key, f"{where}.narrations")):
        at = f"{where}.narrations[{index}]"
        entry = dict_of(entry, key, at)
        time_s = seconds_of(entry.get(row.time_field), key, f"{at}.{row.time_field}")
        narrations.append((time_s, clean_narration(text_of(entry.get(row.text_field), key, at)), at))
    left_out = {"unclear": 0, "repeated": 0}
    sayings: list[Saying] = []
    for time_s, text, at in sorted(narrations, key=lambda narration: narration[0]):
        if len(text.split()) < 2:
            left_out["unclear"] += 1
        elif sayings and sayings[-1].text == text:
            left_out["repeated"] += 1
        else:
            sayings.append(Saying("assistant", time_s, text, at, (time_s, time_s)))
    require(bool(sayings), key, f"{where}.narrations: none of at least two words; drop the row")
    watch = watch_until(sayings[-1].t, context.fps, sayings[0].t - 1.0 / context.fps)
    sayings.insert(0, Saying("user", watch.start_s, NARRATE, ""))
    events = _with_silences(hold_talk(sayings, watch, key))
    metadata = {"format": row.format, "video": row.video, "pass": row.name, "left_out": left_out}
    return stream_of(key, context.video(row.video, key), watch, events, metadata, silence="explicit")


def clean_narration(text: str) -> str:
    """`#C C  picks a #unsure` as `C picks a something.`"""
    text = " ".join(_TAG.sub(" ", _UNSURE.sub(" something ", text)).split()).strip(" .,")
    return text[:1].upper() + text[1:] + "." if text else ""


def _with_silences(events: list[dict]) -> list[dict]:
    """Silence is right after a narration until the next, if that comes soon."""
    result: list[dict] = []
    for event, following in zip(events, [*events[1:], None], strict=True):
        result.append(event)
        close = event["role"] == "assistant" and following and following["t"] - event["t"] <= CLOSE_S
        if close:
            silence = {"id": f"s{len(result)}", "t": event["t"], "t_end": following["t"]}
            result.append(silence | {"role": "assistant", "kind": "silence"})
    return result
