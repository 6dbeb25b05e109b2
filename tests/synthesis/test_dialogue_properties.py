"""Whatever the captions are: no answer holds anything of a later one, and every stream parses, compiles and repeats."""

import json
import re
from dataclasses import replace

from caption_cases import TOKENIZER, free_timelines, outcome_of, state_timelines
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample

seeds = st.integers(0, 2**20)
#: what the templates of the answers add to the captions
TEMPLATES = set("it is are now then the there and he she they at on of one".split())


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def replies(sample: dict) -> list[dict]:
    return [event for event in sample["events"] if event["role"] == "assistant" and "text" in event]


@given(
    st.one_of(free_timelines(), state_timelines()),
    seeds,
    st.sampled_from([3.0, 8.0, 38.0]),
    st.booleans(),
    st.sampled_from([1.0, 0.5, 2.0, 3.3]),
    st.sampled_from([0.0, 1.7]),
)
@settings(max_examples=60, deadline=None)
def test_answers_hold_only_what_has_been_seen(of, seed, rate, spread, fps, start_s):
    """Independent of the leakage check: each word of a reply is one of the templates or of a caption known by then."""
    of = replace(of, start_s=start_s)
    outcome = outcome_of(
        of, seed=seed, fps=fps, tokens_per_second=rate, rate_spread=0.5 * spread, question_every_s=10.0
    )
    if outcome.sample is None:
        assert outcome.rejections[-1].item == "video"
        return
    sample = json.loads(outcome.sample)
    for event in replies(sample):
        known = [caption for caption in of.captions if caption.seen_s <= event["t"] + 1e-6]
        assert known
        held = set().union(*(words(caption.text) for caption in known))
        # a state lends its noun to the description of another: "blocks" is "block"
        assert words(event["text"]) <= held | TEMPLATES, event
        assert event["evidence"][1] <= event["t"] + 1e-6
        if "chunks" in event:
            assert "".join(text for _, text in event["chunks"]) == event["text"]


@given(st.one_of(free_timelines(), state_timelines()), seeds)
@settings(max_examples=30, deadline=None)
def test_every_stream_compiles_and_is_the_same_again(of, seed):
    outcome = outcome_of(of, seed=seed, question_every_s=8.0)
    assert outcome == outcome_of(of, seed=seed, question_every_s=8.0)
    rejected = [rejection for rejection in outcome.rejections if rejection.item != "video"]
    if outcome.sample is None:
        return
    counts = outcome.counts
    assert counts["planned"] == counts["questions"] + len(rejected)
    sample = parse_sample(outcome.sample, "clip")
    row = compile_sample(sample, {"v0": MediaInfo(of.end_s, 25.0)}, TOKENIZER, CompilerConfig(tokens_per_second=8.0))
    said = {slot.event_id for slot in row.slots if slot.event_id is not None}
    assert said == {event.id for event in sample.events if hasattr(event, "text") and event.role == "assistant"}
    metadata, events = sample.source_metadata, {event.id: event for event in sample.events}
    assert len([event for event in sample.events if event.role == "user"]) == counts["questions"]
    assert len(metadata["confirmations"]) == counts["confirmations"]
    for one in metadata["questions"]:
        answer = events[one["answer_id"]]
        assert (answer.text, answer.t, answer.reply_to) == (one["answer"], one["answer_t"], one["id"])
        assert events[one["id"]].t == one["asked_t"] and one["evidence_t"] <= answer.t
    for one in metadata["revisions"]:
        revision, old = events[one["id"]], events[one["supersedes"]]
        assert (revision.kind, revision.supersedes, revision.text, old.text) == (
            "revise", one["supersedes"], one["new"], one["old"],
        )  # fmt: skip
        assert one["t"] <= revision.t


@given(state_timelines(), seeds)
@settings(max_examples=30, deadline=None)
def test_the_answer_about_a_state_is_what_is_shown(of, seed):
    """At every frame at which nobody speaks, what was said last about an attribute is true, unless the reply that
    corrects it waits for its turn; confirmations say so."""
    outcome = outcome_of(of, seed=seed, tokens_per_second=38.0)
    if outcome.sample is None:
        return
    sample = json.loads(outcome.sample)
    for one in sample["source_metadata"]["confirmations"]:
        seen = [caption.text for caption in of.captions if caption.seen_s <= one["t"] + 1e-6]
        value = one["standing"].removeprefix("It is ").removesuffix(".")
        assert value in seen[-1].split() and one["attribute"] in ("colour", "place", "count")
    for event in replies(sample):
        if event["text"].count(",") == 0:
            value = event["text"].removeprefix("It is ").removesuffix(".").removesuffix(" now")
            seen = [caption.text for caption in of.captions if caption.seen_s <= event["t"] + 1e-6]
            assert value in seen[-1].split()
