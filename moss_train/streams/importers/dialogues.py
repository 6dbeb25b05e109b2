"""Timed dialogues about a video: VideoLLM-online's live chats and Streamo's instructions. One sample a row.

Several rows may share a video. Each is a dialogue of its own, often with the same questions, so they are not merged;
the loader decodes a shared video once.
"""

from collections.abc import Iterator
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
from moss_train.streams.importers.narrations import NarrationPass, import_narrations, narration_stream_rows
from moss_train.streams.importers.talk import Saying, hold_talk, stream_of, watch_until

#: a live chat is watched from this long before its first question
WATCHED_BEFORE_S = 10.0


def videollm_online_rows(loaded: Any) -> Iterator[Any]:
    """Rows of the live chat file (a list) or of a narration stream file (an object)."""
    yield from narration_stream_rows(loaded) if isinstance(loaded, dict) else loaded


def import_videollm_online(row: Any, key: str, context: ImportContext) -> Imported:
    """`{"video_uid", "conversation": [{"role", "content", "time"}]}`, or a pass of a narration stream.

    As the authors' loader does: the dialogue starts with a question and ends before the first message whose time goes
    back; of two answers at one time the later counts. What is left out is counted in `source_metadata.left_out`.
    """
    if isinstance(row, NarrationPass):
        return import_narrations(row, key, context)
    row = dict_of(row, key, "the row")
    video = text_of(row.get("video_uid"), key, "video_uid")
    messages = list_of(row.get("conversation"), key, "conversation")
    sayings: list[Saying] = []
    used = 0
    for index, message in enumerate(messages):
        where = f"conversation[{index}]"
        message = dict_of(message, key, where)
        role = message.get("role")
        require(role in ("user", "assistant"), key, f"{where}.role: {role!r} is neither user nor assistant")
        require(index > 0 or role == "user", key, f"{where}.role: a live chat starts with a question")
        time_s = seconds_of(message.get("time"), key, f"{where}.time")
        text = text_of(message.get("content"), key, f"{where}.content").strip()
        if sayings and time_s < sayings[-1].t:
            break
        used += 1
        if not text:
            require(role == "assistant", key, f"{where}.content: is blank; a question says something")
            continue
        if sayings and sayings[-1].role == role == "assistant" and sayings[-1].t == time_s:
            sayings.pop()
        sayings.append(Saying(role, time_s, text, where))
    require(any(saying.role == "assistant" for saying in sayings), key, "conversation: nobody answers; drop the row")
    first_s, last_s = sayings[0].t, sayings[-1].t
    watch = watch_until(last_s, context.fps, max(0.0, first_s - WATCHED_BEFORE_S))
    metadata = {"format": "videollm_online", "video": video, "left_out": {"after_going_back": len(messages) - used}}
    return stream_of(key, context.video(video, key), watch, hold_talk(sayings, watch, key), metadata)


def import_streamo(row: Any, key: str, context: ImportContext) -> Imported:
    """`{"video_path", "question": [{"content", "time"}], "response": [{"content", "st_time", "end_time", "time"}]}`.

    Streamo counts turns of one second: what stands at second n is said in the turn that shows n-1 to n, so a question
    is asked at n-1 and an instant response (`time`) comes at n. A response without `time` rests on [st_time, end_time]
    and comes when that is over. Equal responses at one time count once.
    """
    row = dict_of(row, key, "the row")
    path = text_of(row.get("video_path") or row.get("video_name"), key, "video_path")
    sayings = []
    for index, question in enumerate(list_of(row.get("question"), key, "question")):
        where = f"question[{index}]"
        question = dict_of(question, key, where)
        text = _said(question, key, where)
        asked_s = seconds_of(question.get("time"), key, f"{where}.time")
        sayings.append(Saying("user", max(0.0, asked_s - 1.0), text, where))
    require(bool(sayings), key, "question: is empty; a response answers one")
    first_asked_s = min(saying.t for saying in sayings)
    seen = set()
    for index, response in enumerate(list_of(row.get("response"), key, "response")):
        where = f"response[{index}]"
        response = dict_of(response, key, where)
        text = _said(response, key, where)
        time_s, evidence = _when(response, key, where)
        require(time_s >= first_asked_s, key, f"{where}: comes at {time_s} s, before the first question")
        if (time_s, text) not in seen:
            sayings.append(Saying("assistant", time_s, text, where, evidence))
        seen.add((time_s, text))
    require(bool(seen), key, "response: is empty; drop the row")
    watch = watch_until(max(saying.t for saying in sayings), context.fps)
    metadata = {"format": "streamo"} | {name: row[name] for name in ("task_type", "source") if name in row}
    return stream_of(key, path, watch, hold_talk(sayings, watch, key), metadata)


def _said(entry: dict, key: str, where: str) -> str:
    text = text_of(entry.get("content"), key, f"{where}.content").strip()
    require(bool(text), key, f"{where}.content: is blank; drop the entry")
    return text


def _when(response: dict, key: str, where: str) -> tuple[float, tuple[float, float] | None]:
    """When a response is due, and the span it rests on."""
    given = {name: response.get(name) for name in ("st_time", "end_time", "time")}
    times = {
        name: seconds_of(value, key, f"{where}.{name}") for name, value in given.items() if value not in (None, "")
    }
    start_s, end_s = times.get("st_time"), times.get("end_time")
    require((start_s is None) == (end_s is None), key, f"{where}: needs both st_time and end_time, or neither")
    if start_s is not None and end_s is not None:
        require(start_s <= end_s, key, f"{where}.end_time: {end_s} is before st_time {start_s}; swap them")
        due_s = times.get("time", end_s)
        return due_s, (min(start_s, due_s), min(end_s, due_s))
    require("time" in times, key, f"{where}.time: missing; give it, or st_time and end_time")
    return times["time"], None
