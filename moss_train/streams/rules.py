"""What must hold between the fields of a sample. Each fault is raised with the path of its field and the remedy."""

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from moss_train.streams.media import PLACEHOLDERS, SAME_MOMENT_S, VIDEO_EXTENSIONS

if TYPE_CHECKING:
    from moss_train.streams.schema import (
        CaptionSample,
        Confirm,
        ConversationSample,
        Media,
        OfflineSampling,
        Reply,
        StreamSample,
        Thought,
    )


def path_text(parts: Iterable[str | int]) -> str:
    """`("events", 3, "t")` as `events[3].t`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def fail(parts: Iterable[str | int], fault: str) -> None:
    """Refuse the sample because of the field at `parts`."""
    # braces would be read as fields of pydantic's message template
    raise PydanticCustomError("rule", "{message}", {"message": f"{path_text(parts)}: {fault}"})


def placeholders_of(text: str) -> list[str]:
    """The kinds of the media placeholders in `text`, in order."""
    found = []
    for kind, placeholder in PLACEHOLDERS.items():
        start = text.find(placeholder)
        while start >= 0:
            found.append((start, kind))
            start = text.find(placeholder, start + len(placeholder))
    return [kind for _, kind in sorted(found)]


def check_media(media: "list[Media]") -> None:
    """Ids and members are unique; a member's extension fits the kind."""
    for name in ("id", "member"):
        seen = set()
        for index, medium in enumerate(media):
            value = getattr(medium, name)
            if value in seen:
                fail(("media", index, name), f"{value!r} is used twice; give every medium its own")
            seen.add(value)
    for index, medium in enumerate(media):
        is_video = medium.member.rsplit(".", 1)[-1] in VIDEO_EXTENSIONS
        if is_video != (medium.kind == "video"):
            fail(("media", index, "member"), f"{medium.member!r} does not fit kind {medium.kind!r}; mend one of them")


def _check_placeholders(path: tuple, kinds: list[str], media: "list[Media]") -> None:
    if len(kinds) != len(media):
        fail(path, f"{len(kinds)} placeholders for {len(media)} media; write one placeholder a medium, in their order")
    for index, (kind, medium) in enumerate(zip(kinds, media, strict=True)):
        if kind != medium.kind:
            fail(
                path, f"placeholder {index} is {PLACEHOLDERS[kind]} but medium {medium.id!r} is of kind {medium.kind!r}"
            )


def _check_times(times_s: list[float]) -> None:
    for index, (earlier, later) in enumerate(pairwise(times_s), start=1):
        if later <= earlier + SAME_MOMENT_S:
            fail(("sampling", "times_s", index), f"{later} is not after the time above it ({earlier}); sort them")


def _check_offline_sampling(sampling: "OfflineSampling | None", media: "list[Media]") -> None:
    if sampling is None:
        return
    if sampling.times_s is not None:
        others = sorted(sampling.model_fields_set - {"times_s"})
        if others:
            fail(("sampling", others[0]), "has no effect beside times_s; remove one of them")
        videos = sum(medium.kind == "video" for medium in media)
        if videos != 1:
            fail(("sampling", "times_s"), f"names frames of one video, the sample has {videos}; split the sample")
        _check_times(sampling.times_s)
    if sampling.end_s is not None and sampling.end_s <= sampling.start_s:
        fail(("sampling", "end_s"), f"{sampling.end_s} is not after start_s {sampling.start_s}; swap or drop them")
    if sampling.min_frames and sampling.max_frames and sampling.min_frames > sampling.max_frames:
        fail(("sampling", "min_frames"), f"{sampling.min_frames} exceeds max_frames {sampling.max_frames}; lower it")


def check_caption(sample: "CaptionSample") -> None:
    check_media(sample.media)
    _check_offline_sampling(sample.sampling, sample.media)
    kinds = placeholders_of(sample.prompt + sample.text)
    if kinds:
        _check_placeholders(("text",), kinds, sample.media)


def check_conversation(sample: "ConversationSample") -> None:
    check_media(sample.media)
    _check_offline_sampling(sample.sampling, sample.media)
    for index, message in enumerate(sample.messages):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            fail(("messages", index, "role"), f"is {message.role!r}; turns alternate and start with the user")
        if message.role == "user" and not message.train:
            fail(("messages", index, "train"), "user turns are never trained; remove the field")
    if len(sample.messages) % 2:
        fail(("messages", len(sample.messages) - 1), "the last turn must be the assistant's; add its answer or drop it")
    kinds = [kind for message in sample.messages for kind in placeholders_of(message.content)]
    _check_placeholders(("messages",), kinds, sample.media)


def check_stream(sample: "StreamSample") -> None:
    """Times in range and in order, links that point back, one running reply at a time."""
    check_media(sample.media)
    if len(sample.media) != 1 or sample.media[0].kind != "video":
        fail(("media",), "a stream watches exactly one video; split the sample or use kind conversation")
    start_s, end_s = sample.sampling.start_s, sample.sampling.end_s
    if end_s <= start_s:
        fail(("sampling", "end_s"), f"{end_s} is not after start_s {start_s}; give the range that is watched")
    times_s = sample.sampling.times_s
    if times_s is not None:
        if sample.sampling.fps is not None:
            fail(("sampling", "fps"), "has no effect beside times_s; remove one of them")
        _check_times(times_s)
        if not start_s <= times_s[0] or not times_s[-1] < end_s:
            fail(("sampling", "times_s"), f"must lie in [start_s, end_s) = [{start_s}, {end_s}); mend either")
    duration_s = sample.media[0].duration_s
    if duration_s is not None and start_s >= duration_s:
        fail(("sampling", "start_s"), f"{start_s} is not inside the video of {duration_s} s")

    seen: dict[str, tuple[int, str]] = {}
    superseded: dict[str, int] = {}  # reply → the event that replaces it
    previous_t = start_s
    running: tuple[int, float] | None = None  # index and last known emission time of the reply that may still run
    for index, event in enumerate(sample.events):
        path = ("events", index)
        if event.id in seen:
            fail((*path, "id"), f"{event.id!r} is already event {seen[event.id][0]}; ids are unique in a sample")
        if not start_s <= event.t < end_s:
            fail(
                (*path, "t"), f"{event.t} lies outside the sampling range [{start_s}, {end_s}); move or drop the event"
            )
        if event.t < previous_t:
            fail((*path, "t"), f"{event.t} is before the event above it ({previous_t}); sort the events by time")
        previous_t = event.t
        if event.role == "user":
            running = None
        elif event.kind == "silence":
            if sample.silence != "explicit":
                fail((*path, "kind"), 'silence intervals need "silence": "explicit"; set it or drop the event')
            if not event.t < event.t_end <= end_s:
                fail((*path, "t_end"), f"{event.t_end} must lie in ({event.t}, {end_s}]; mend the interval")
        elif event.kind in ("confirm", "think"):
            _check_seen(sample, path, event)
            if event.kind == "confirm":
                _check_confirmed(path, event.confirms, seen, superseded)
            elif event.text and not event.text.strip():
                fail((*path, "text"), 'is blank; write what is thought, or "" for nothing to note')
        else:
            if running is not None and event.t <= running[1] + SAME_MOMENT_S:
                fail(
                    (*path, "t"), f"{event.t}: events[{running[0]}] still runs until {running[1]}; one reply at a time"
                )
            last_t = _check_reply(sample, path, event, seen)
            # what is said before the first frame is over when that frame arrives, at the very same time
            said_before_frames = event.evidence == [] and last_t <= start_s + SAME_MOMENT_S
            running = None if said_before_frames else (index, last_t)
            if event.supersedes is not None:
                superseded[event.supersedes] = index
        seen[event.id] = (index, "user" if event.role == "user" else event.kind)


def _check_reply(sample: "StreamSample", path: tuple, event: "Reply", seen: dict[str, tuple[int, str]]) -> float:
    """Checks one reply; returns the last moment at which it is known to be said."""
    last_t = _check_exact_times(sample, path, event)
    if not event.text.strip():
        fail((*path, "text"), "is blank; a moment without words is silence, drop the event")
    if event.evidence is not None and event.evidence:
        if len(event.evidence) != 2 or event.evidence[0] > event.evidence[1]:
            fail((*path, "evidence"), f"{event.evidence} is no interval; write [from, to], or [] for nothing seen")
        if event.t < event.evidence[0] or last_t < event.evidence[1]:
            fail(
                (*path, "t"),
                f"the reply (at {event.t}, last words at {last_t}) comes before its evidence {event.evidence}; "
                "move it to where the evidence is complete",
            )
        if event.evidence[0] < sample.sampling.start_s:
            fail(
                (*path, "evidence"), f"starts before the sampling range ({sample.sampling.start_s}); it is never shown"
            )
    if event.reply_to is not None:
        index, kind = seen.get(event.reply_to, (-1, ""))
        if kind != "user":
            fail(
                (*path, "reply_to"), f"{event.reply_to!r} is no earlier user event; no reply comes before its question"
            )
    if event.kind == "revise" and event.supersedes is None:
        fail((*path, "supersedes"), "a revision must name the reply it replaces; add it or use kind speak")
    if event.supersedes is not None:
        index, kind = seen.get(event.supersedes, (-1, ""))
        if kind not in ("speak", "revise"):
            fail((*path, "supersedes"), f"{event.supersedes!r} is no earlier reply; it must point back to one")
        if event.kind != "revise":
            fail((*path, "supersedes"), "only kind revise supersedes a reply; set the kind or drop the field")
    return last_t


def _check_seen(sample: "StreamSample", path: tuple, event: "Confirm | Thought") -> None:
    """What the event rests on has been seen by then."""
    if event.evidence is None:
        return
    if event.evidence[0] > event.evidence[1]:
        fail((*path, "evidence"), f"{event.evidence} is no interval; write [from, to]")
    if event.t < event.evidence[1]:
        fail((*path, "t"), f"{event.t} is before its evidence {event.evidence} is complete; move it there")
    if event.evidence[0] < sample.sampling.start_s:
        fail((*path, "evidence"), f"starts before the sampling range ({sample.sampling.start_s}); it is never shown")


def _check_confirmed(path: tuple, reply: str, seen: dict[str, tuple[int, str]], superseded: dict[str, int]) -> None:
    if seen.get(reply, (-1, ""))[1] not in ("speak", "revise"):
        fail((*path, "confirms"), f"{reply!r} is no earlier reply; it must point back to one")
    if reply in superseded:
        fail((*path, "confirms"), f"{reply!r} was replaced by events[{superseded[reply]}]; confirm what still stands")


def _check_exact_times(sample: "StreamSample", path: tuple, event: "Reply") -> float:
    """Checks `chunks` and `words`; returns the time of the last one that decides (else the reply's own)."""
    end_s = sample.sampling.end_s
    for name, times, texts in (
        ("words", [word[0] for word in event.words or []], [word[2] for word in event.words or []]),
        ("chunks", [chunk[0] for chunk in event.chunks or []], [chunk[1] for chunk in event.chunks or []]),
    ):
        if not times:
            continue
        for index, moment in enumerate(times):
            if not event.t <= moment < end_s:
                fail((*path, name, index), f"its time {moment} lies outside [{event.t}, {end_s}), the reply's reach")
            if index and moment < times[index - 1]:
                fail((*path, name, index), f"its time {moment} is before the one above it; sort them by time")
        if "".join(texts) != event.text and not (name == "words" and " ".join(texts) == event.text):
            fail((*path, name), "joined they are not the reply's text; make both say the same")
    for index, word in enumerate(event.words or []):
        if word[1] < word[0]:
            fail((*path, "words", index), f"ends at {word[1]}, before it starts at {word[0]}; swap the times")
    decisive = event.chunks or event.words
    return decisive[-1][0] if decisive else event.t
