"""A video as a timeline of captions, and the moments at which something new can be known of it.

A caption may be used from `seen_s` on, never before. What describes a state (a scene that stands still) is seen as soon
as its span begins; what tells an event, only when a given share of its span has passed, since nobody can tell from the
sentence how much of it the end of the span holds.
"""

import bisect
from dataclasses import dataclass

from moss_train.streams.importers.talk import Watch

_ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class Caption:
    """A sentence about a span of the video, seconds of the video's clock."""

    start_s: float
    end_s: float
    text: str
    seen_s: float  #: from when on it may be used


@dataclass(frozen=True)
class CaptionTimeline:
    """All captions of one video, in the order in which they become known. It is watched from `start_s` to `end_s`."""

    key: str
    end_s: float
    captions: tuple[Caption, ...]
    states: bool = False  #: captions say what is on screen throughout their spans, which follow each other
    start_s: float = 0.0

    @staticmethod
    def of(
        key: str, end_s: float, captions: list[Caption], states: bool = False, start_s: float = 0.0
    ) -> "CaptionTimeline":
        """The timeline of captions in any order."""
        ordered = sorted(captions, key=lambda caption: (caption.seen_s, caption.start_s, caption.text))
        return CaptionTimeline(key, end_s, tuple(ordered), states, start_s)

    def known(self, time_s: float) -> int:
        """How many captions may be used at `time_s`; they are the first ones."""
        return bisect.bisect_right(self.captions, time_s + 1e-6, key=lambda caption: caption.seen_s)

    def seen(self, time_s: float) -> tuple[Caption, ...]:
        """What may be used at `time_s`."""
        return self.captions[: self.known(time_s)]

    def later(self, time_s: float) -> tuple[Caption, ...]:
        """What may not be used yet at `time_s`."""
        return self.captions[self.known(time_s) :]


@dataclass(frozen=True)
class Change:
    """A frame at which what is known differs from the frame before."""

    frame: int
    time_s: float
    known: int  #: captions that are known by now
    news: tuple[Caption, ...]  #: those of them that were not known before


def find_changes(timeline: CaptionTimeline, watch: Watch) -> list[Change]:
    """The change detector: every frame of `watch` at which a caption becomes known that says something else than the
    one before it. Captions that become known after the last frame change nothing."""
    changes: list[Change] = []
    last = watch.frames() - 1
    before = ""
    for number, caption in enumerate(timeline.captions):
        frame = watch.first_from(caption.seen_s)
        says = meaning(caption.text)
        if frame > last or says == before:
            continue
        before = says
        if changes and changes[-1].frame == frame:
            held = changes.pop()
            changes.append(Change(frame, held.time_s, number + 1, (*held.news, caption)))
        else:
            changes.append(Change(frame, watch.time(frame), number + 1, (caption,)))
    return changes


def plain(text: str) -> str:
    """The text for comparisons: lower case, single spaces, no full stop."""
    return " ".join(text.casefold().split()).rstrip(".!?")


def meaning(text: str) -> str:
    """The text for comparing what is told: `plain`, and without articles. Somebody who is "a man" at first is "the man"
    from then on, and nothing has happened."""
    said = plain(text)
    return " ".join(word for word in said.split() if word not in _ARTICLES) or said
