"""The reference's real-time rows: assistant turns cut into slots by one `<|video|>` a frame (model_facts C.1).

A turn with n frames has n + 1 slots; each is `<|silence|>`, or text that goes on in the next slot, or text that
ends in `<|silence|>`. A turn that is interrupted ends in bare text. The rows do not say whether a later reply
adds to or corrects an earlier one, so every reply is imported as `speak`.
"""

import json
from dataclasses import dataclass

from moss_train.errors import SampleError
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS, CompilerConfig
from moss_train.streams.importers.common import describe_media, list_of, require, text_of
from moss_train.streams.media import PLACEHOLDERS, stream_frame_times
from moss_train.streams.schema import Reply, StreamSample
from moss_train.streams.timeline import TimelineSlot, build_timeline

INFO_PREFIX = "[RealTime QA][INFO]"
PLACEHOLDER_ENTRY = "[RealTime QA][PLACEHOLDER]"
SILENCE = REFERENCE_SPECIAL_STRINGS["silence"]
FRAME = PLACEHOLDERS["video"]


@dataclass
class _Row:
    """A real-time row while its events are collected."""

    key: str
    step_s: float
    start_s: float
    events: list[dict]
    frames: int = 0  #: frames that have arrived
    replies: int = 0
    questions: int = 0

    def question_time(self) -> float:
        """Midway between the last frame and the next; the very start when none has arrived."""
        return self.start_s + (self.frames - 0.5) * self.step_s if self.frames else self.start_s


def import_realtime_row(row: dict, key: str, metadata: dict) -> tuple[dict, dict[str, str]]:
    """The stream sample's JSON fields and {member: source path}; adds to `metadata` what export needs."""
    videos = list_of(row["videos"], key, "videos")
    path, start_s, step_s, count = _read_info(videos[0], key, metadata)
    require(
        len(videos) == count and all(entry == PLACEHOLDER_ENTRY for entry in videos[1:]),
        key,
        f"videos: {len(videos)} entries for {count} times; there is one entry a frame, all but the first placeholders",
    )
    require(not row.get("images"), key, "images: a real-time row watches one video; drop the images")
    messages = row["messages"]
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages[0 if system is None else 1 :]
    collected = _Row(key, step_s, start_s, [])
    require(len(turns) % 2 == 0 and bool(turns), key, "messages: turns are user and assistant in pairs; mend the row")
    for index in range(0, len(turns), 2):
        user, assistant = turns[index], turns[index + 1]
        require(
            (user["role"], assistant["role"]) == ("user", "assistant"),
            key,
            f"messages: turn {index} is {user['role']}, {assistant['role']}; expected user, assistant",
        )
        _read_turn(collected, user["content"], assistant["content"], first=index == 0, last=index + 2 == len(turns))
    require(collected.frames == count, key, f"messages: {collected.frames} frames in the turns for {count} times")
    media, members = describe_media([("video", path)], key)
    metadata["paths"] = [path]
    data = {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": media,
        "sampling": {"fps": 1.0 / step_s, "start_s": start_s, "end_s": start_s + count * step_s},
        "events": collected.events,
        "source_metadata": metadata,
    }
    return data | ({} if system is None else {"system": system}), members


def _read_info(entry: str, key: str, metadata: dict) -> tuple[str, float, float, int]:
    """Path of the video, time of the first frame, step between frames (seconds), number of frames."""
    try:
        info = json.loads(entry.removeprefix(INFO_PREFIX))
        path, times = info["video_path"], [_seconds(text) for text in info["time_info"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SampleError(key, f"videos[0]: no readable video_path and time_info ({error!r}); mend the row") from error
    require(bool(times), key, "videos[0]: time_info is empty; a real-time row has at least one frame")
    step_s = times[1] - times[0] if len(times) > 1 else 1
    even = step_s > 0 and all(time == times[0] + index * step_s for index, time in enumerate(times))
    require(even, key, "videos[0]: time_info is not evenly spaced; a stream samples at one rate: split or resample it")
    if entry != _write_info(path, times[0], step_s, len(times)):
        metadata["info"] = entry
    return text_of(path, key, "videos[0].video_path"), float(times[0]), float(step_s), len(times)


def _seconds(text: str) -> int:
    """`MM:SS` or `HH:MM:SS` in seconds."""
    seconds = 0
    for part in text.split(":"):
        seconds = seconds * 60 + int(part)
    return seconds


def _write_info(path: str, start_s: float, step_s: float, count: int) -> str:
    times = [int(start_s + index * step_s) for index in range(count)]
    info = {"video_path": path, "time_info": [f"{time // 60:02d}:{time % 60:02d}" for time in times]}
    return INFO_PREFIX + json.dumps(info)


def _read_turn(row: _Row, question: str, answer: str, first: bool, last: bool) -> None:
    require(FRAME not in question, row.key, f"messages: {FRAME} in a user turn; frames stand in the assistant's turns")
    slots = answer.split(FRAME)
    asked_s = row.question_time()
    # an empty opening turn needs no event, unless another turn follows before the first frame
    if not first or question or (len(slots) == 1 and not last):
        row.events.append({"id": f"q{row.questions}", "t": asked_s, "role": "user", "text": question})
        row.questions += 1
        before = row.events[-2] if len(row.events) > 1 else {}
        if not before.get("complete", True):
            del before["complete"]  # the interruption says it
            row.events[-1]["kind"] = "interrupt"
    reply: dict | None = None
    for index, slot in enumerate(slots):
        if index:
            slot_s = row.start_s + row.frames * row.step_s
            row.frames += 1
        else:
            slot_s = asked_s
        reply = _read_slot(row, slot, slot_s, reply, opening=index == 0 and row.frames == 0)
    if reply is not None:
        reply["complete"] = False


def _read_slot(row: _Row, slot: str, slot_s: float, reply: dict | None, opening: bool) -> dict | None:
    """Adds what one slot says; returns the reply that goes on in the next slot, if any."""
    text, marker, rest = slot.partition(SILENCE)
    where = f"messages: the slot at {slot_s} s ({slot[:40]!r})"
    require(not rest, row.key, f"{where} goes on after its silence; a slot ends there")
    require(bool(text or marker), row.key, f"{where} is empty; every frame is answered by text or {SILENCE}")
    if not text:
        require(reply is None, row.key, f"{where} is silent, but the reply before it did not end in {SILENCE}")
        return None
    if reply is None:
        reply = {"id": f"a{row.replies}", "t": slot_s, "role": "assistant", "kind": "speak", "text": "", "chunks": []}
        questions = [event["id"] for event in row.events if event["role"] == "user"]
        reply |= {"reply_to": questions[-1]} if questions else {}
        reply |= {"evidence": []} if opening else {}
        row.replies += 1
        row.events.append(reply)
    reply["chunks"].append([slot_s, text])
    reply["text"] += text
    return None if marker else reply


def export_realtime_row(sample: StreamSample, metadata: dict) -> dict:
    """The real-time row of a stream whose replies all have `chunks` (the row needs the text of every slot)."""
    for index, event in enumerate(sample.events):
        if isinstance(event, Reply) and event.chunks is None:
            raise SampleError(
                sample.key, f"events[{index}].chunks: missing; a real-time row needs the text of each slot"
            )
    require(sample.silence == "implicit", sample.key, "silence: a real-time row cannot leave silence unknown")
    require(sample.sampling.fps is not None, sample.key, "sampling.fps: a real-time row has a fixed rate; set it")
    fps = sample.sampling.fps
    arrivals = stream_frame_times(fps, sample.sampling.start_s, sample.sampling.end_s)
    slots = build_timeline(sample, arrivals, CompilerConfig(), _Characters())
    messages = [] if sample.system is None else [{"role": "system", "content": sample.system}]
    for slot in slots:
        if slot.opens_turn:
            messages.append({"role": "user", "content": slot.question.text if slot.question else ""})
            messages.append({"role": "assistant", "content": ""})
        else:
            messages[-1]["content"] += FRAME
        messages[-1]["content"] += _slot_text(slot)
    path = (metadata.get("paths") or [f"{sample.key}.{sample.media[0].member}"])[0]
    info = metadata.get("info") or _write_info(path, sample.sampling.start_s, 1.0 / fps, len(arrivals))
    row = {"messages": messages, "videos": [info] + [PLACEHOLDER_ENTRY] * (len(arrivals) - 1)}
    return row | ({"images": []} if "images" in metadata.get("lists", ["images"]) else {})


class _Characters:
    """Stands in for a tokenizer: the timeline is laid out in characters, so its pieces are the text itself."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def _slot_text(slot: TimelineSlot) -> str:
    if slot.piece is None:
        return SILENCE
    return "".join(map(chr, slot.piece.ids)) + (SILENCE if slot.piece.stops else "")
