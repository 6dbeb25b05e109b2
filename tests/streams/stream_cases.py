"""Samples and shorthands shared by the tests of this room."""

import json
from functools import cache
from pathlib import Path

from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample
from moss_train.streams.split import RowBudget, compile_parts
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer

DATA = Path(__file__).parent / "data"


@cache
def tokenizer() -> StreamTokenizer:
    return load_tokenizer(TokenizerConfig())


def rows(name: str) -> list[dict]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def stream(*events: dict, end_s: float = 8.0, **fields) -> dict:
    """A stream at one frame a second; the events lack only their ids."""
    numbered = [{"id": f"e{index}"} | event for index, event in enumerate(events)]
    return {
        "schema": "moss_train/stream@1",
        "id": "case",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"fps": 1.0, "end_s": end_s},
        "events": numbered,
    } | fields


def user(t: float, text: str = "Where is it?", **fields) -> dict:
    return {"t": t, "role": "user", "text": text} | fields


def say(t: float, text: str, **fields) -> dict:
    return {"t": t, "role": "assistant", "kind": "speak", "text": text} | fields


def revise(t: float, text: str, supersedes: str, **fields) -> dict:
    return {"t": t, "role": "assistant", "kind": "revise", "text": text, "supersedes": supersedes} | fields


def confirm(t: float, confirms: str, **fields) -> dict:
    return {"t": t, "role": "assistant", "kind": "confirm", "confirms": confirms} | fields


def think(t: float, text: str, **fields) -> dict:
    return {"t": t, "role": "assistant", "kind": "think", "text": text} | fields


def compiled(data: dict, config: CompilerConfig | None = None, rng=None, jitter=None, duration_s: float = 600.0):
    sample = parse_sample(data, "key")
    media = {medium.id: MediaInfo(duration_s, 25.0, int(duration_s * 25)) for medium in sample.media}
    return compile_sample(sample, media, tokenizer(), config or CompilerConfig(), rng, jitter)


def parts_of(data: dict, budget: RowBudget | None, config: CompilerConfig | None = None, rng=None, variation=None):
    sample = parse_sample(data, "key")
    media = {medium.id: MediaInfo(86_400.0, 25.0) for medium in sample.media}
    return compile_parts(sample, media, tokenizer(), config or CompilerConfig(), budget, rng, variation)


def layout(row) -> list[str]:
    """What the assistant and the user say and see, slot by slot, in a form a test can spell out.

    `#` is an anchor, `_` silence, `|` the end of a turn, `U:` opens what the user says, `A` the answer's header.
    """
    text = tokenizer().decode(row.ids)
    for token, sign in (
        ("<|begin_of_text|>", ""),
        ("<|start_header_id|>user<|end_header_id|>\n\n", "U:"),
        ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", " A "),
        ("<|image|>", " #"),
        ("<|silence|>", "_"),
        ("<|eot_id|>", " | "),
    ):
        text = text.replace(token, sign)
    return text.strip()
