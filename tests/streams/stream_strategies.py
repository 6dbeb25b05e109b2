"""Random timelines and compiler configurations, shared by the property tests of this room."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from stream_cases import compiled

from moss_train.errors import SampleError
from moss_train.streams.config import CompilerConfig

TEXTS = st.sampled_from(
    [
        "It is red.",
        "Now blue.",
        "né🙂e",
        " two\n\nblocks ",
        "<|silence|>",
        "a",
        "The red block is in the top left corner now.",
    ]
)
CONFIGS = st.builds(
    CompilerConfig,
    tokens_per_second=st.sampled_from([0.5, 2.0, 3.5, 38.0]),
    jitter_probability=st.sampled_from([0.0, 0.5, 1.0]),
    window=st.sampled_from([None, 1, 3]),
)


@st.composite
def _arrivals(draw, end_s: float) -> dict:
    """At a rate, or at uneven times."""
    if draw(st.integers(0, 3)):
        return {"fps": draw(st.sampled_from([0.7, 1.0, 2.0]))}
    eighths = draw(st.sets(st.integers(0, int(end_s * 8) - 1), min_size=1, max_size=int(end_s * 2)))
    return {"times_s": [eighth / 8 for eighth in sorted(eighths)]}


@st.composite
def streams(draw, ends_s: tuple[float, ...] = (1.0, 4.0, 9.5), most_events: int = 6) -> dict:
    end_s = draw(st.sampled_from(ends_s))
    times = sorted(draw(st.lists(st.integers(0, int(end_s * 4) - 1), max_size=most_events)))
    events, replies, standing = [], [], []
    for index, quarter in enumerate(times):
        t, name = quarter / 4, f"e{index}"
        forms = ["ask", "interrupt", "speak", "speak", "chunks", "words", "revise", "silence", "confirm"]
        form = draw(st.sampled_from(forms))
        if form in ("ask", "interrupt"):
            events.append({"id": name, "t": t, "role": "user", "kind": form, "text": draw(TEXTS)})
            continue
        if form == "silence":
            events.append({"id": name, "t": t, "t_end": t + 0.25, "role": "assistant", "kind": "silence"})
            continue
        if form == "confirm" and standing:
            confirms = draw(st.sampled_from(standing))
            events.append({"id": name, "t": t, "role": "assistant", "kind": "confirm", "confirms": confirms})
            continue
        kind = "revise" if form == "revise" and replies else "speak"
        event = {"id": name, "t": t, "role": "assistant", "kind": kind, "text": draw(TEXTS)}
        event |= {"supersedes": draw(st.sampled_from(replies))} if kind == "revise" else {}
        event |= draw(
            st.sampled_from([{}, {}, {"stale": True}, {"train": False}, {"evidence": [0.0, t]}, {"evidence": []}])
        )
        if form in ("chunks", "words"):
            later = sorted(draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.5]), min_size=1, max_size=3)))
            moments = [t, *(t + gap for gap in later if t + gap < end_s)]
            parts = ["re", *(draw(st.sampled_from(["d block", " is", "🙂"])) for _ in moments[1:])]
            event["text"] = "".join(parts)
            exact = zip(moments, parts, strict=True)
            event[form] = [[m, p] for m, p in exact] if form == "chunks" else [[m, m, p] for m, p in exact]
        events.append(event)
        replies.append(name)
        standing = [reply for reply in (*standing, name) if reply != event.get("supersedes")]
    explicit = any(event.get("kind") == "silence" for event in events)
    return {
        "schema": "moss_train/stream@1",
        "id": "random",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"end_s": end_s} | draw(_arrivals(end_s)),
        "silence": "explicit" if explicit else "implicit",
        "events": events,
    }


def compiled_or_refused(data: dict, config: CompilerConfig, seed: int = 0):
    """The row, or nothing when the timeline has two replies at once or one after the last frame."""
    try:
        return compiled(data, config, np.random.default_rng(seed))
    except SampleError as error:
        assert "events[" in error.reason
        assume(False)
