"""`data show`: what the picture and the text say of a row, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from data_samples import caption_json, numbered_clip, stage, still
from PIL import Image

from moss_train.cli import main
from moss_train.data.shards.pack import pack
from moss_train.data.show import Item, ShowOptions, describe, read_items, show_command, text_lines
from moss_train.data.show_picture import KIND_COLOURS
from moss_train.data.synthetic.render import RenderOptions, render
from moss_train.errors import ConfigError, DataError
from moss_train.streams.compiled import Kind
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample
from moss_train.streams.split import RowBudget, compile_parts
from moss_train.streams.tokenizer import load_tokenizer

STREAM = {
    "schema": "moss_train/stream@1",
    "id": "s",
    "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
    "sampling": {"fps": 1.0, "end_s": 20.0},
    "system": "Say <|silence|> or speak.",
    "events": [
        {"id": "q", "t": 1.5, "role": "user", "text": "How much is $x$?"},
        {"id": "a", "t": 2.0, "role": "assistant", "kind": "speak", "text": "One.", "reply_to": "q"},
        {"id": "b", "t": 3.0, "role": "assistant", "kind": "revise", "supersedes": "a", "text": "Two."},
        {"id": "c", "t": 16.0, "role": "assistant", "kind": "speak", "text": "A long answer that runs on and on. " * 6},
        {"id": "i", "t": 17.5, "role": "user", "kind": "interrupt", "text": "Stop."},
    ],
}
CONVERSATION = {
    "schema": "moss_train/conversation@1",
    "id": "c",
    "media": [{"id": "v0", "kind": "video", "member": "0.mp4"}, {"id": "i0", "kind": "image", "member": "1.png"}],
    "messages": [
        {"role": "user", "content": "<|video|>And <|image|>?"},
        {"role": "assistant", "content": "Numbers."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "train": False},
    ],
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    staging = folder / "staging"
    stage(staging, "stream", STREAM, mp4=numbered_clip(40, rate=2))
    stage(staging, "talk", CONVERSATION, _0_mp4=numbered_clip(12, rate=4), _1_png=still(3))
    stage(staging, "text", caption_json("text", None, "Only text."))
    pack(staging, folder / "packed")
    return folder / "packed"


def items_of(data: dict, budget: RowBudget | None = None, part: int = 0, **compiler):
    tokenizer = load_tokenizer(TokenizerConfig())
    sample = parse_sample(data, "key")
    media = {medium.id: MediaInfo(20.0, 2.0, 40) for medium in sample.media}
    config = CompilerConfig(**compiler)
    row = (
        compile_parts(sample, media, tokenizer, config, budget)[part]
        if budget
        else compile_sample(sample, media, tokenizer, config)
    )
    return row, read_items(row, tokenizer)


def said(items: list[Item]) -> list[tuple]:
    return [(item.role, item.frame, item.text) for item in items if item.text]


def test_a_stream_taken_apart():
    row, items = items_of(STREAM)
    first, long = "How much is $x$?", "A long answer that runs on and on. " * 6
    assert said(items)[:4] == [
        ("system", None, "Say <|silence|> or speak."),
        ("user", None, first),
        ("assistant", 2, "One."),
        ("assistant", 3, "Two."),
    ]
    running = [item for item in items if item.frame in (16, 17)]
    assert "".join(item.text for item in running) == long[: len("".join(item.text for item in running))]
    assert [item.ending for item in running] == ["goes on", "cut by the user"]
    assert [item.time_s for item in items if item.role == "user"] == [0.0, 1.5, 17.5]
    silent = [item for item in items if item.silent]
    assert {item.frame for item in silent} >= {0, 1, 4, 15} and all(not item.text for item in silent)
    # every trained label belongs to exactly one item
    covered = np.zeros(len(row.ids), int)
    for item in items:
        covered[item.first - 1 : item.end - 1] += 1
    assert covered.max() == 1 and (covered[row.kinds > 0] == 1).all()


def test_text_form():
    row, items = items_of(STREAM, window=4, sinks=1)
    lines = text_lines(row, items)
    assert describe(row, 1).startswith("key: stream, ") and "20 frames" in describe(row, 1)
    (revised,) = (line for line in lines if line.endswith("Two."))
    # the revision is two or more tokens and the silence that stops it; the window of 4 at frame 3 is still all
    assert "0-3" in revised and "revision" in revised and "1 stop silence" in revised
    (late,) = (line for line in lines if "  10    10.00 s" in line)
    assert "0,7-10" in late and "1 idle silence" in late and late.endswith("(silence)")
    assert any(line.endswith("user: How much is $x$?") for line in lines)


def test_a_part_says_what_it_repeats():
    _, items = items_of(STREAM, RowBudget(400, 8), part=1)
    context = [(item.role, item.text) for item in items if item.context]
    assert context == [("user", ""), ("user", "How much is $x$?"), ("assistant", "One.Two.")]
    assert [item.time_s for item in items if item.frame is not None][:2] == [8.0, 9.0]


def test_a_conversation_taken_apart():
    row, items = items_of(CONVERSATION, max_frames=3)
    assert [item.frame for item in items if item.frame is not None] == [0, 1, 2, 3]
    assert said(items) == [
        ("user", None, "And "),
        ("user", None, "?"),
        ("assistant", None, "Numbers."),
        ("user", None, "Sure?"),
        ("assistant", None, "Yes."),
    ]
    trained = [line for line in text_lines(row, items) if " text " in line]
    assert len(trained) == 1 and trained[0].endswith("assistant: Numbers.")


def colours_in(path) -> set[tuple[int, int, int]]:
    return set(map(tuple, np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()))


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


@pytest.mark.parametrize("key", ["stream", "talk", "text"])
def test_the_picture_shows_what_is_trained(packed, tmp_path, key, capsys):
    out = tmp_path / "sample.png"
    assert show_command(ShowOptions(str(packed), key, str(out))) == 0
    assert f"wrote {out}: {key}: " in capsys.readouterr().out
    seen = colours_in(out)
    kinds = {"stream": {Kind.TEXT, Kind.ONSET, Kind.IDLE_SILENCE, Kind.STOP_SILENCE, Kind.REVISION}}
    for kind in set(Kind) - {Kind.IGNORED}:
        assert (rgb(KIND_COLOURS[kind]) in seen) == (kind in kinds.get(key, {Kind.TEXT})), kind


def test_long_silences_are_shown_in_part(packed, tmp_path):
    """Twenty frames, eleven of them silent in a row: fewer lines than all of them would take."""
    heights = {}
    for name, more in (("whole", {}), ("part", {"pack_text_tokens": 4096, "pack_frames": 8})):
        out = tmp_path / f"{name}.png"
        show_command(ShowOptions(str(packed), "stream", str(out), **more))
        heights[name] = Image.open(out).height
    assert heights["part"] < heights["whole"] < 1200


def test_text_goes_to_standard_output(packed, capsys):
    assert show_command(ShowOptions(str(packed), "", "-")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("stream: stream, ") and "[cut by the user]" in printed


def test_what_is_refused(packed, tmp_path):
    with pytest.raises(DataError, match="holds no sample 'strea'; near it: stream"):
        show_command(ShowOptions(str(packed), "strea", "-"))
    with pytest.raises(ConfigError, match=r"part=3: the sample has 3 part\(s\)"):
        show_command(ShowOptions(str(packed), "stream", "-", part=3, pack_text_tokens=4096, pack_frames=8))
    with pytest.raises(DataError, match="does not exist"):
        show_command(ShowOptions(str(packed), "text", str(tmp_path / "absent" / "x.png")))
    with pytest.raises(ConfigError, match="must end in .png"):
        ShowOptions("x", out="x.jpg").validate()
    with pytest.raises(ConfigError, match="pack_frames=0"):
        ShowOptions("x", pack_text_tokens=9, pack_frames=0).validate()


def test_the_example_of_the_documentation_shows_what_it_is_of(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "streams.md").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^    (moss-train data show path=data/realtime .*)$", page.replace("\\\n", " "), re.MULTILINE
    )
    render(RenderOptions(out=str(tmp_path / "clips"), align=0, temporal=0, sft=0, realtime=1, heldout=1, workers=1))
    pack(tmp_path / "clips" / "train" / "realtime", tmp_path / "data" / "realtime")
    arguments = command.split()[1:]
    arguments[2] = f"path={tmp_path / 'data' / 'realtime'}"
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "left out by keep_silence" in shown and "the answer is wrong by now" in shown
