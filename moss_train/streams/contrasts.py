"""Where a revision departs from what it replaces: the first token in which the two differ.

An objective may there prefer the new reply's token to the old one's, both behind their common beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moss_train.streams.schema import Reply, StreamSample
from moss_train.streams.timeline import TimelineSlot
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class Contrast:
    """Of one revision."""

    place: int  #: among the ids of its text
    token: int  #: what the superseded reply has there, silence where it ends
    ends: bool  #: the revision says nothing more: it differs in the silence that ends it


def find_contrasts(
    sample: StreamSample, timeline: Sequence[TimelineSlot], tokenizer: StreamTokenizer
) -> dict[str, Contrast]:
    """Revision → its contrast; absent where the texts are the same, or the user cut it before they differ."""
    replies = {event.id: event for event in sample.events if isinstance(event, Reply)}
    revisions = {event.id: event for event in replies.values() if event.kind == "revise"}
    if not revisions:
        return {}
    said: dict[str, list[int]] = {name: [] for name in revisions}
    complete = dict.fromkeys(revisions, False)
    for slot in timeline:
        if slot.piece is not None and slot.piece.event.id in said:
            said[slot.piece.event.id] += slot.piece.ids
            complete[slot.piece.event.id] = slot.piece.stops
    found = {}
    for name, revision in revisions.items():
        # what ends a reply counts as its last token; one that was cut has no end
        new = [*said[name], *([tokenizer.special.silence] if complete[name] else [])]
        old = [*_text_ids(replies[revision.supersedes or ""], tokenizer), tokenizer.special.silence]
        place = next((i for i, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), None)
        if place is not None:
            found[name] = Contrast(place, old[place], ends=place == len(said[name]))
    return found


def _text_ids(reply: Reply, tokenizer: StreamTokenizer) -> list[int]:
    """All that a reply would have said, tokenised as it is."""
    texts = [text for _, text in reply.chunks] if reply.chunks is not None else [reply.text]
    return [token for text in texts for token in tokenizer.encode(text)]
