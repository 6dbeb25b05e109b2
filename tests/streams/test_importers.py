"""Rows of public formats in and out."""

import copy

import pytest
from stream_cases import revise, rows, say, stream, user

from moss_train.errors import SampleError
from moss_train.streams.importers.conversations import import_conversation, import_conversations
from moss_train.streams.importers.moss import export_moss_row, import_moss_row, import_moss_rows
from moss_train.streams.schema import dump_sample, parse_sample

FILES = ["mllm_pretrain_demo", "mllm_offline_sft_demo", "mllm_realtime_sft_demo"]


@pytest.mark.parametrize("name", FILES)
def test_demo_rows_come_back_equal(name):
    imported = import_moss_rows(rows(name), "demo")
    assert [sample.key for sample, _ in imported] == ["demo-000000", "demo-000001", "demo-000002"]
    for row, (sample, members) in zip(rows(name), imported, strict=True):
        stored = parse_sample(dump_sample(sample), sample.key)  # as read from a tar
        assert stored == sample
        assert export_moss_row(stored) == row
        assert set(members) == {medium.member for medium in sample.media}


def test_media_paths_of_the_demo_rows():
    paths = [members for name in FILES for _, members in import_moss_rows(rows(name))]
    assert paths[0] == {"jpg": "mllm_demo_data/1.jpg"}
    assert paths[4] == {"avi": "mllm_demo_data/2.avi"}
    assert paths[6] == {"mp4": "data/mllm_realtime_data/PI2UGwbvDEY.mp4"}


def test_an_interruption_is_found():
    sample, _ = import_moss_row(rows("mllm_realtime_sft_demo")[1], "row")
    cut, stop, answer = sample.events[1:4]
    assert cut.text.endswith("sleek, digita") and stop.kind == "interrupt" and answer.t == stop.t == 8.5
    assert [event.kind for event in sample.events] == ["ask", "speak", "interrupt", "speak", "speak"]


def test_what_rows_may_carry_beside_is_kept():
    row = copy.deepcopy(rows("mllm_realtime_sft_demo")[2])
    row["system_tag"] = "realtime"
    row["messages"][1]["loss"] = 0
    row["videos"][0] = row["videos"][0].replace('", "', '","')  # another spelling of the same JSON
    assert export_moss_row(import_moss_row(row, "row")[0]) == row
    conversation = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "<|image|><|video|>Both <|image|>?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": ["a.png", "b.JPG"],
        "videos": ["c.webm"],
        "system_tag": 3,
    }
    sample, members = import_moss_row(conversation, "row")
    assert members == {"0.png": "a.png", "1.webm": "c.webm", "2.jpg": "b.JPG"}
    assert export_moss_row(sample) == conversation


def realtime(*contents: str, times: list[str]) -> dict:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    listed = ", ".join(f'"{time}"' for time in times)
    info = f'[RealTime QA][INFO]{{"video_path": "v.mp4", "time_info": [{listed}]}}'
    return {"messages": messages, "videos": [info] + ["[RealTime QA][PLACEHOLDER]"] * (len(times) - 1), "images": []}


S, V = "<|silence|>", "<|video|>"


def test_other_times_than_every_second_from_zero():
    row = realtime("", f"{S}{V}{S}{V}Red.{S}", times=["00:10", "00:12"])
    sample, _ = import_moss_row(row, "row")
    assert (sample.sampling.start_s, sample.sampling.fps, sample.sampling.end_s) == (10.0, 0.5, 14.0)
    assert sample.events[0].t == 12.0
    assert export_moss_row(sample) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (realtime("", f"{S}{V}{V}{S}", times=["00:00", "00:01"]), "is empty"),
        (realtime("", f"{S}{V}{S}Red.", times=["00:00"]), "goes on after its silence"),
        (realtime("", f"{S}{V}Red{V}{S}", times=["00:00", "00:01"]), "did not end in"),
        (realtime("", f"{S}{V}{S}", times=["00:00", "00:01"]), "1 frames in the turns for 2 times"),
        (realtime("", f"{S}{V}{S}{V}{S}{V}{S}", times=["00:00", "00:01", "00:03"]), "not evenly spaced"),
        (realtime("", f"{S}{V}{S}", "Now?", times=["00:00"]), "in pairs"),
        (realtime(f"{V}Now?", f"{S}{V}{S}", times=["00:00"]), "in a user turn"),
        ({"messages": [], "videos": ["[RealTime QA][INFO]{}"]}, "no readable video_path"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "messages[1].content"),
        (
            {"messages": [{"role": "user", "content": V}, {"role": "assistant", "content": "b"}]},
            "more video placeholders",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "images": ["a.png"],
            },
            "have no placeholder",
        ),
        (
            {"messages": [{"role": "user", "content": V}, {"role": "assistant", "content": "b"}], "videos": ["a.exe"]},
            "unknown extension",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "messages[1].role"),
        ({}, "messages: is NoneType"),
        ([], "not a JSON object"),
    ],
)
def test_rows_that_cannot_be_represented(row, message):
    with pytest.raises(SampleError) as caught:
        import_moss_row(row, "the-key")
    assert message in caught.value.reason and caught.value.key == "the-key"


def test_export_of_a_stream_that_was_never_a_row():
    chunks = {"chunks": [[1.0, "It is"], [2.0, " red."]]}
    data = stream(
        user(0.5), say(1.0, "It is red.", **chunks), revise(3.0, "Blue.", "e1", chunks=[[3.0, "Blue."]]), end_s=4.0
    )
    row = export_moss_row(parse_sample(data, "key"))
    assert [message["content"] for message in row["messages"]] == [
        "",
        f"{S}{V}{S}",
        "Where is it?",
        f"{S}{V}It is{V} red.{S}{V}Blue.{S}",
    ]
    assert row["videos"][0].startswith('[RealTime QA][INFO]{"video_path": "key.mp4"')
    with pytest.raises(SampleError, match=r"events\[0\].chunks"):
        export_moss_row(parse_sample(stream(say(1.0, "Red.")), "key"))
    with pytest.raises(SampleError, match="silence"):
        export_moss_row(parse_sample(stream(silence="explicit"), "key"))


def test_conversations_of_the_llava_form():
    row = {
        "id": "7",
        "image": "a/b.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A ball."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    ((sample, members),) = import_conversations([row], "llava")
    assert sample.key == "llava-000000" and members == {"jpg": "a/b.jpg"}
    assert [message.content for message in sample.messages] == ["<|image|>What is it?", "A ball.", "Sure?", "Yes."]
    row["conversations"][0]["value"] = "What is it?"  # no placeholder: shown first
    assert import_conversation(row, "key")[0].messages[0].content == "<|image|>What is it?"


def test_conversations_of_the_messages_form():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "v.mp4"},
                    {"type": "text", "text": "Same as "},
                    {"type": "image", "image": "i.png"},
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ]
    }
    sample, members = import_conversation(row, "key")
    assert sample.system == "Be brief." and members == {"0.mp4": "v.mp4", "1.png": "i.png"}
    assert sample.messages[0].content == "<|video|>Same as <|image|>?"
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    assert import_conversation(plain, "key") == (import_conversation(plain, "key")[0], {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "neither messages nor conversations"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "conversations[0].from: 'robot' is none of human"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]},
            "more image placeholders",
        ),
        ({"image": 3, "conversations": []}, "image: is int"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "type 'sound'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
def test_malformed_conversations(row, message):
    with pytest.raises(SampleError) as caught:
        import_conversation(row, "key")
    assert message in caught.value.reason
