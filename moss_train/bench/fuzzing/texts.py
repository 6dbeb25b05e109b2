"""Hostile JSON members: wrong types, absurd numbers, deep nesting, broken encodings, special tokens as text."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from moss_train.bench.fuzzing.media import FRAMES, RATE, mutate
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS


class _Raw(str):
    """A number as it shall stand in the JSON, whatever Python would make of it."""


_NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e308", "1e9999", "-1e308", "1" + "0" * 400, "1" + "0" * 5000, "-1", "0", "1e-320",
    "9223372036854775808", "1e8", "100000000", "1000", "0.1", "-0.0",
)  # fmt: skip
_TEXTS = (
    "", "\x00", "\ud800", "\uffff", "a" * 100_000, "".join(REFERENCE_SPECIAL_STRINGS.values()), "<|image|>" * 1000,
    "<|video|>", "<|silence|>", "../../etc/passwd", "é" * 3000, "\u202e\u200b", "{}", "𝕏" * 2000, "\n" * 1000,
    "mp4", "0.mp4", "json", "file:///etc/passwd", "user", "assistant", "speak", "revise", "moss_train/stream@1",
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": 1}, [None], [1, 2], ["x"])


def stream_sample(key: str, member: str, fps: float = RATE, seconds: float = FRAMES / RATE) -> dict[str, Any]:
    """A stream over a clip: a question, an answer, a revision."""
    return {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": [{"id": "v0", "kind": "video", "member": member}],
        "sampling": {"fps": fps, "start_s": 0.0, "end_s": seconds},
        "system": "Watch.",
        "events": [
            {"id": "q", "t": 0.0, "role": "user", "text": "What is it?"},
            {"id": "a", "t": 0.4, "role": "assistant", "kind": "speak", "text": "red", "reply_to": "q"},
            {"id": "b", "t": 1.4, "role": "assistant", "kind": "revise", "text": "blue", "supersedes": "a"},
        ],
    }


def caption_sample(key: str, member: str, is_video: bool) -> dict[str, Any]:
    """A caption of one medium."""
    media = [{"id": "m", "kind": "video" if is_video else "image", "member": member}]
    return {"schema": "moss_train/caption@1", "id": key, "media": media, "text": "a picture"}


def conversation_sample(key: str, member: str, is_video: bool) -> dict[str, Any]:
    """A question about one medium and its answer."""
    place = "<|video|>" if is_video else "<|image|>"
    return {
        "schema": "moss_train/conversation@1",
        "id": key,
        "media": [{"id": "m", "kind": "video" if is_video else "image", "member": member}],
        "sampling": {"fps": 2.0, "max_frames": 8} if is_video else None,
        "messages": [{"role": "user", "content": f"{place}What?"}, {"role": "assistant", "content": "A thing."}],
    }


def hostile_text(sample: dict[str, Any], rng: np.random.Generator) -> tuple[bytes, str]:
    """The JSON of `sample` after a mutation, and the mutation's name."""
    kind = ("leaf", "leaf", "leaf", "leaf", "bytes", "whole", "structure", "structure")[rng.integers(8)]
    if kind == "bytes":
        data, name = mutate(_encode(sample), rng)
        return data, f"bytes {name}"
    if kind == "whole":
        wholes = list(_WHOLE.items())
        name, make = wholes[rng.integers(len(wholes))]
        return make(sample, rng), name
    if kind == "structure":
        changes = list(_STRUCTURE.items())
        name, change = changes[rng.integers(len(changes))]
        return _encode(change(json.loads(json.dumps(sample)), rng)), name
    changed, path = sample, ""
    for _ in range(int(rng.integers(1, 3))):
        changed, path = _replace_leaf(changed, rng)
    return _encode(changed), f"leaf {path}"


def _replace_leaf(sample: dict[str, Any], rng: np.random.Generator) -> tuple[dict[str, Any], str]:
    copy = json.loads(json.dumps(sample, default=str))
    paths = list(_paths(copy, ()))
    path = paths[rng.integers(len(paths))]
    node = copy
    for part in path[:-1]:
        node = node[part]
    draw = rng.random()
    if draw < 0.45:
        value: Any = _Raw(_NUMBERS[rng.integers(len(_NUMBERS))])
    elif draw < 0.8:
        value = _TEXTS[rng.integers(len(_TEXTS))]
    else:
        value = _OTHERS[rng.integers(len(_OTHERS))]
    if rng.random() < 0.1 and isinstance(node, dict):
        del node[path[-1]]
        value = "left out"
    else:
        node[path[-1]] = value
    return copy, f"{'.'.join(map(str, path))} := {str(value)[:20]!r}"


def _paths(node: Any, path: tuple) -> Any:
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for part, below in items:
        yield from _paths(below, (*path, part))


def _encode(value: Any) -> bytes:
    """JSON with `_Raw` numbers as they stand; lone surrogates are escaped, as a careless writer would."""
    raw: list[str] = []

    def mark(node: Any) -> Any:
        if isinstance(node, _Raw):
            raw.append(str(node))
            return f"@raw{len(raw) - 1}@"
        if isinstance(node, dict):
            return {str(key): mark(below) for key, below in node.items()}
        return [mark(below) for below in node] if isinstance(node, list) else node

    text = json.dumps(mark(value))
    for number, literal in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', literal)
    return text.encode()


def _nested(sample: dict, rng: np.random.Generator) -> bytes:
    depth = int(10 ** rng.integers(2, 6))
    opened, closed = ("[", "]") if rng.random() < 0.5 else ('{"a":', "}")
    inside = opened * depth + "1" + closed * depth
    return json.dumps(sample | {"source_metadata": {"x": "@"}}).replace('"@"', inside).encode()


_WHOLE: dict[str, Callable[[dict, np.random.Generator], bytes]] = {
    "deep nesting": _nested,
    "empty": lambda sample, rng: b"",
    "not an object": lambda sample, rng: (b"[]", b"1", b'"x"', b"null", b"NaN")[rng.integers(5)],
    "byte order mark": lambda sample, rng: b"\xef\xbb\xbf" + _encode(sample),
    "utf-16": lambda sample, rng: json.dumps(sample).encode("utf-16"),
    "bytes that are no utf-8": lambda sample, rng: _encode(sample).replace(b"id", b"i\xff\xfe", 1),
    "text that is no utf-8": lambda sample, rng: _encode(sample).replace(b'"id": "', b'"id": "\xc3\x28\xed\xa0\x80', 1),
    "doubled key": lambda sample, rng: _encode(sample)[:-1] + b', "schema": 7, "media": 1}',
    "two documents": lambda sample, rng: _encode(sample) * 2,
    "a video": lambda sample, rng: rng.bytes(5000),
    "megabytes of blanks": lambda sample, rng: b" " * 3_000_000 + _encode(sample),
}


def _many_events(sample: dict, rng: np.random.Generator) -> dict:
    if "events" in sample:
        sample["events"] = [
            {"id": f"e{n}", "t": n * 1e-4, "role": "user", "text": "x"} for n in range(int(rng.integers(100, 20_000)))
        ]
    return sample


def _many_frames(sample: dict, rng: np.random.Generator) -> dict:
    """Frames beyond all measure, from a few bytes."""
    if "events" in sample:
        sample["sampling"] = {"fps": 1000.0, "start_s": 0.0, "end_s": float(10.0 ** rng.integers(1, 9))}
    else:
        sample["sampling"] = {"fps": 1000.0, "max_frames": int(10 ** rng.integers(1, 18))}
    return sample


def _many_media(sample: dict, rng: np.random.Generator) -> dict:
    sample["media"] = [sample["media"][0] | {"id": f"m{n}"} for n in range(int(rng.integers(2, 3000)))]
    return sample


def _many_anchors(sample: dict, rng: np.random.Generator) -> dict:
    place = "<|image|>" * int(rng.integers(1, 2000))
    if "text" in sample:
        return sample | {"text": place}
    return sample | {"system": place + "<|silence|>" * 100}


def _shuffled(sample: dict, rng: np.random.Generator) -> dict:
    name = "events" if "events" in sample else "messages" if "messages" in sample else "media"
    sample[name] = [sample[name][place] for place in rng.permutation(len(sample[name]))] * int(rng.integers(1, 3))
    return sample


def _unsampled(sample: dict, rng: np.random.Generator) -> dict:
    start = float(rng.choice([0.0, 1.999, 2.0, 50.0, 1e8]))
    sample["sampling"] = {"start_s": start, "end_s": start + float(rng.choice([0.0, 1e-9, 0.2, -1.0, 100.0]))}
    return sample


_STRUCTURE: dict[str, Callable[[dict, np.random.Generator], dict]] = {
    "many events": _many_events,
    "many frames": _many_frames,
    "many media": _many_media,
    "many anchors": _many_anchors,
    "shuffled": _shuffled,
    "odd sampling": _unsampled,
    "unknown field": lambda sample, rng: sample | {"__class__": "os.system", "extra": [1] * 1000},
    "another schema": lambda sample, rng: sample | {"schema": f"moss_train/stream@{rng.integers(2, 9)}"},
    "another member": lambda sample, rng: (
        sample
        | {"media": [{"id": "v0", "kind": "video", "member": str(rng.choice(["../x.mp4", "9.mp4", "json", "/x.mp4"]))}]}
    ),
}
