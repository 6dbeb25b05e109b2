"""Faulty samples are refused with the path of the field; sound ones survive a round trip through JSON."""

import copy
import json

import pytest
from stream_cases import confirm, revise, say, stream, think, user

from moss_train.errors import SampleError
from moss_train.streams.schema import dump_sample, parse_sample

DESIGN_EXAMPLE = {
    "schema": "moss_train/stream@1",
    "id": "example",
    "media": [{"id": "v0", "kind": "video", "member": "mp4", "duration_s": 155.0}],
    "sampling": {"fps": 1.0, "start_s": 0.0, "end_s": 155.0},
    "system": "Watch.",
    "silence": "implicit",
    "events": [
        {"id": "q1", "t": 12.0, "role": "user", "text": "What is he building?"},
        {
            "id": "a1",
            "t": 14.0,
            "role": "assistant",
            "kind": "speak",
            "text": "A toy tractor.",
            "evidence": [2.0, 14.0],
            "reply_to": "q1",
        },
        {
            "id": "a2",
            "t": 41.0,
            "role": "assistant",
            "kind": "revise",
            "supersedes": "a1",
            "evidence": [40.0, 41.0],
            "text": "Two tractors now.",
        },
        {"id": "i1", "t": 43.5, "role": "user", "kind": "interrupt", "text": "Stop. What colour?"},
    ],
}
CAPTION = {
    "schema": "moss_train/caption@1",
    "id": "caption",
    "media": [{"id": "i0", "kind": "image", "member": "jpg"}],
    "text": "<|image|>A ball.",
}
CONVERSATION = {
    "schema": "moss_train/conversation@1",
    "id": "conversation",
    "media": [{"id": "v0", "kind": "video", "member": "0.mp4"}, {"id": "i1", "kind": "image", "member": "1.png"}],
    "messages": [
        {"role": "user", "content": "<|video|>And here <|image|>?"},
        {"role": "assistant", "content": "Both red."},
    ],
}


@pytest.mark.parametrize("data", [DESIGN_EXAMPLE, CAPTION, CONVERSATION])
def test_round_trip(data):
    sample = parse_sample(json.dumps(data).encode(), "key")
    assert sample.key == "key" and sample.id == data["id"]
    assert parse_sample(dump_sample(sample), "key") == sample
    assert parse_sample(data, "key") == sample


def changed(data: dict, *path, value) -> dict:
    data = copy.deepcopy(data)
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (changed(DESIGN_EXAMPLE, "colour", value=1), "colour: unknown field"),
        (changed(DESIGN_EXAMPLE, "events", 1, "tt", value=1), "events[1].tt: unknown field"),
        (changed(DESIGN_EXAMPLE, "media", 0, "uri", value="x"), "media[0].uri: unknown field"),
        (changed(DESIGN_EXAMPLE, "schema_name", value="moss_train/stream@1"), "schema_name: unknown field"),
        (changed(DESIGN_EXAMPLE, "events", 0, "t", value="12"), "events[0].t: "),
        (changed(DESIGN_EXAMPLE, "events", 0, "t", value=True), "events[0].t: "),
        (changed(DESIGN_EXAMPLE, "events", 0, "t", value=float("nan")), "events[0].t: "),
        (changed(DESIGN_EXAMPLE, "events", 0, "t", value=-1.0), "events[0].t: -1.0 lies outside"),
        (changed(DESIGN_EXAMPLE, "events", 3, "t", value=155.0), "events[3].t: 155.0 lies outside"),
        (changed(DESIGN_EXAMPLE, "events", 3, "t", value=40.0), "events[3].t: 40.0 is before the event above"),
        (changed(DESIGN_EXAMPLE, "events", 3, "id", value="a1"), "events[3].id: 'a1' is already event 1"),
        (changed(DESIGN_EXAMPLE, "events", 1, "reply_to", value="i1"), "events[1].reply_to: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "reply_to", value="a2"), "events[1].reply_to: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "evidence", value=[2.0, 15.0]), "events[1].t: the reply (at 14.0"),
        (changed(DESIGN_EXAMPLE, "events", 1, "evidence", value=[15.0, 16.0]), "events[1].t: the reply (at 14.0"),
        (changed(DESIGN_EXAMPLE, "events", 1, "evidence", value=[3.0, 2.0]), "events[1].evidence: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "evidence", value=[3.0]), "events[1].evidence: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "text", value=" "), "events[1].text: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "kind", value="shout"), "events[1].kind: "),
        (changed(DESIGN_EXAMPLE, "events", 1, "role", value="narrator"), "events[1]: an event needs a role"),
        (changed(DESIGN_EXAMPLE, "events", 2, "supersedes", value="q1"), "events[2].supersedes: "),
        (changed(DESIGN_EXAMPLE, "events", 2, "supersedes", value="a2"), "events[2].supersedes: "),
        (changed(DESIGN_EXAMPLE, "events", 2, "supersedes", value=None), "events[2].supersedes: a revision must"),
        (changed(DESIGN_EXAMPLE, "events", 2, "kind", value="speak"), "events[2].supersedes: only kind revise"),
        (changed(DESIGN_EXAMPLE, "sampling", "end_s", value=0.0), "sampling.end_s: "),
        (changed(DESIGN_EXAMPLE, "sampling", "fps", value=0), "sampling.fps: "),
        (changed(DESIGN_EXAMPLE, "sampling", "fps", value=1e300), "sampling.fps: "),
        (changed(DESIGN_EXAMPLE, "sampling", "end_s", value=1e308), "sampling.end_s: "),
        (changed(DESIGN_EXAMPLE, "media", value=[]), "media: a stream watches exactly one video"),
        (changed(DESIGN_EXAMPLE, "media", 0, "member", value="../x.mp4"), "media[0].member: "),
        (changed(DESIGN_EXAMPLE, "media", 0, "kind", value="image"), "media[0].member: "),
        (changed(DESIGN_EXAMPLE, "silence", value="maybe"), "silence: "),
        (stream(say(1.0, "ab", chunks=[[1.0, "a"], [2.0, "c"]])), "events[0].chunks: joined they are not"),
        (stream(say(1.0, "ab", chunks=[[0.5, "ab"]])), "events[0].chunks[0]: its time 0.5 lies outside"),
        (stream(say(1.0, "ab", chunks=[[2.0, "a"], [1.0, "b"]])), "events[0].chunks[1]: "),
        (stream(say(1.0, "a b", words=[[1.0, 0.5, "a"], [2.0, 2.5, "b"]])), "events[0].words[0]: ends at"),
        (stream(say(1.0, "a c", words=[[1.0, 1.5, "a"], [2.0, 2.5, "b"]])), "events[0].words: joined"),
        (stream(say(1.0, "ab", chunks=[[1.0, "a"], [2.0, "b"]]), say(2.0, "c")), "events[1].t: 2.0: events[0] still"),
        (stream(say(1.0, "a"), say(1.0, "b")), "events[1].t: 1.0: events[0] still runs"),
        (stream({"t": 1.0, "t_end": 2.0, "role": "assistant", "kind": "silence"}), "events[0].kind: silence intervals"),
        (
            stream({"t": 1.0, "t_end": 1.0, "role": "assistant", "kind": "silence"}, silence="explicit"),
            "events[0].t_end: ",
        ),
        (stream(confirm(1.0, "e0")), "events[0].confirms: 'e0' is no earlier reply"),
        (stream(user(1.0), confirm(1.0, "e0")), "events[1].confirms: 'e0' is no earlier reply"),
        (
            stream(say(1.0, "a"), revise(2.0, "b", "e0"), confirm(3.0, "e0")),
            "events[2].confirms: 'e0' was replaced by events[1]",
        ),
        (stream(say(1.0, "a"), confirm(3.0, "e0", evidence=[3.0, 3.5])), "events[1].t: 3.0 is before its evidence"),
        (stream(say(1.0, "a"), confirm(3.0, "e0", text="b")), "events[1].text: unknown field"),
        (stream(think(3.0, "  ")), "events[0].text: is blank"),
        (stream(think(3.0, "a", evidence=[2.0, 1.0])), "events[0].evidence: [2.0, 1.0] is no interval"),
        (stream(think(3.0, "a", evidence=[-1.0, 1.0])), "events[0].evidence: starts before"),
        (stream(think(1.0, "a"), revise(2.0, "b", "e0")), "events[1].supersedes: 'e0' is no earlier reply"),
        (changed(CAPTION, "text", value="<|video|>A ball."), "text: placeholder 0 is <|video|>"),
        (changed(CAPTION, "text", value="<|image|><|image|>A ball."), "text: 2 placeholders for 1 media"),
        (changed(CONVERSATION, "media", 1, "id", value="v0"), "media[1].id: 'v0' is used twice"),
        (changed(CONVERSATION, "media", 1, "member", value="0.mp4"), "media[1].member: '0.mp4' is used twice"),
        (changed(CONVERSATION, "messages", 0, "content", value="<|image|><|video|>"), "messages: placeholder 0"),
        (changed(CONVERSATION, "messages", 1, "role", value="user"), "messages[1].role: "),
        (changed(CONVERSATION, "messages", 0, "role", value="system"), "messages[0].role: "),
        (changed(CONVERSATION, "messages", 0, "train", value=False), "messages[0].train: "),
        (changed(CONVERSATION, "messages", value=CONVERSATION["messages"] + CONVERSATION["messages"][:1]), "messages"),
        (changed(CONVERSATION, "sampling", value={"start_s": 2.0, "end_s": 1.0}), "sampling.end_s: "),
        (changed(CONVERSATION, "sampling", value={"min_frames": 9, "max_frames": 8}), "sampling.min_frames: "),
        ({"schema": "moss_train/stream@2"}, "schema: 'moss_train/stream@2' is unknown"),
        ({}, "schema: None is unknown"),
    ],
)
def test_refused(data, path):
    with pytest.raises(SampleError) as caught:
        parse_sample(data, "the/key")
    assert path in caught.value.reason
    assert caught.value.key == "the/key"


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"3", "{", b'{"schema": []}', b"[" * 100_000, '{"a": "\ud800"}'])
def test_not_a_sample_at_all(data):
    with pytest.raises(SampleError):
        parse_sample(data, "key")


def test_all_faults_are_named_at_once():
    data = changed(changed(DESIGN_EXAMPLE, "events", 0, "tt", value=1), "sampling", "fps", value=0)
    with pytest.raises(SampleError) as caught:
        parse_sample(data, "key")
    assert "events[0].tt" in caught.value.reason and "sampling.fps" in caught.value.reason


def test_what_is_allowed():
    """Forms that look unusual but say something."""
    parse_sample(stream(user(1.0), user(1.0, "And that?"), say(1.0, "Red.")), "key")
    parse_sample(stream(say(1.0, "One."), revise(2.0, "Two.", "e0"), revise(3.0, "Three.", "e1")), "key")
    commentary = say(1.0, "a b", words=[[1.0, 1.5, "a"], [3.0, 3.5, "b"]], evidence=[0.5, 3.0])
    parse_sample(stream(commentary), "key")  # a running commentary starts before its evidence is complete
    running = say(1.0, "a b", chunks=[[1.0, "a"], [3.0, " b"]])
    parse_sample(stream(running, think(1.0, ""), confirm(2.0, "e0", evidence=[1.5, 2.0])), "key")  # while a reply runs
    parse_sample(changed(CAPTION, "text", value="A ball."), "key")  # the media then stand before the text
