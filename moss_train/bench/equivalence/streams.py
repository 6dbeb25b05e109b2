"""Small samples of every form that the compiler knows, compiled, with random pixels. Deterministic in their seed.

Shape suffixes: F frames of a stream, C colours, H, W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from moss_train.data.collate import RowStream
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer

IMAGE_SIZE = 28  #: pixels, a side of every frame
_SQUARES = 4  #: a side of every frame
MAX_TOKENS, MAX_FRAMES = 160, 14  #: of a packed row; every stream below fits

_WORDS = "red green blue small large box ball cup left right moves falls stops turns now again".split()


def _words(rng: np.random.Generator, least: int = 2, most: int = 6) -> str:
    return " ".join(rng.choice(_WORDS, rng.integers(least, most + 1))).capitalize() + "."


def _stream(end_s: float, events: list[dict], **fields) -> dict:
    return {
        "schema": "moss_train/stream@1",
        "id": "live",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"fps": 1.0, "end_s": end_s},
        "events": events,
    } | fields


def revised(rng: np.random.Generator) -> dict:
    """Silence, an answer that runs on over several frames, and another that takes it back."""
    asked, said = 0.5 + float(rng.integers(0, 2)), 2.0 + float(rng.integers(0, 2))
    return _stream(
        float(rng.integers(7, 9)),
        [
            {"id": "q", "t": asked, "role": "user", "text": _words(rng)},
            {"id": "a", "t": said, "role": "assistant", "kind": "speak", "text": _words(rng, 1, 3), "reply_to": "q"},
            {
                "id": "b", "t": said + 2.5, "role": "assistant", "kind": "revise", "supersedes": "a",
                "text": _words(rng), "evidence": [said + 1.0, said + 2.5],
            },
        ],
        system=_words(rng),
    )  # fmt: skip


def interrupted(rng: np.random.Generator) -> dict:
    """A long reply that the user cuts short, and what follows."""
    return _stream(
        float(rng.integers(5, 8)),
        [
            {"id": "a", "t": 1.0, "role": "assistant", "kind": "speak", "text": _words(rng, 12, 16)},
            {"id": "i", "t": 2.5, "role": "user", "kind": "interrupt", "text": _words(rng)},
            {"id": "b", "t": 3.0, "role": "assistant", "kind": "speak", "text": _words(rng), "reply_to": "i"},
        ],
    )


def watched(rng: np.random.Generator) -> dict:
    """Silence that is known to be right in one stretch only; the rest trains nothing."""
    return _stream(
        float(rng.integers(4, 8)),
        [
            {"id": "s", "t": 1.0, "t_end": 2.5, "role": "assistant", "kind": "silence"},
            {"id": "a", "t": 3.0, "role": "assistant", "kind": "speak", "text": _words(rng)},
        ],
        silence="explicit",
    )


def glimpse(rng: np.random.Generator) -> dict:
    """One frame, and nothing to say about it."""
    return _stream(1.0, [{"id": "q", "t": 0.0, "role": "user", "text": _words(rng)}])


def untaught(rng: np.random.Generator) -> dict:
    """Seen and said, but none of it is trained."""
    return _stream(
        3.0,
        [{"id": "a", "t": 1.0, "role": "assistant", "kind": "speak", "text": _words(rng, 1, 2), "train": False}],
        silence="explicit",
    )


def chat(rng: np.random.Generator) -> dict:
    """A conversation about nothing seen."""
    turns = [("user", "assistant")[turn % 2] for turn in range(2 * int(rng.integers(1, 3)))]
    return {
        "schema": "moss_train/conversation@1",
        "id": "chat",
        "media": [],
        "messages": [{"role": role, "content": _words(rng)} for role in turns],
    }


def picture(rng: np.random.Generator) -> dict:
    """A conversation about one or two stills."""
    count = int(rng.integers(1, 3))
    return {
        "schema": "moss_train/conversation@1",
        "id": "picture",
        "media": [{"id": f"i{n}", "kind": "image", "member": f"{n}.jpg"} for n in range(count)],
        "messages": [
            {"role": "user", "content": "<|image|>" * count + _words(rng)},
            {"role": "assistant", "content": _words(rng)},
        ],
    }


def clip(rng: np.random.Generator) -> dict:
    """A caption of a clip that is seen whole."""
    return {
        "schema": "moss_train/caption@1",
        "id": "clip",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"end_s": float(rng.integers(2, 6))},
        "text": _words(rng),
    }


Form = Callable[[np.random.Generator], dict]
FORMS: tuple[Form, ...] = (revised, interrupted, watched, glimpse, untaught, chat, picture, clip)


@dataclass(frozen=True)
class Diet:
    """The samples of each step (round and round), and how they are compiled. No steps: anything, in any number."""

    steps: tuple[tuple[Form, ...], ...] = ()
    compiler: CompilerConfig = field(default_factory=lambda: CompilerConfig(tokens_per_second=4.0))


_WINDOWED = CompilerConfig(
    tokens_per_second=4.0,
    window=2,
    sinks=1,
    text_window=20,
    text_sinks=4,
    positions="decoupled",
    jitter_probability=0.5,
)
DIETS: dict[str, Diet] = {
    "mixed": Diet(((revised, interrupted, chat, watched, picture), (clip, revised, glimpse), (watched, chat, clip))),
    "windowed": Diet(((revised, watched, clip, interrupted), (interrupted, picture, chat)), _WINDOWED),
    # A step without any frame comes first, so that nothing left over from an earlier step can help it.
    "text": Diet(((chat, chat, chat), (revised, chat, clip), (chat,))),
    "images": Diet(((picture, picture, picture), (picture,))),
    # Fewer frames than there are shares, fewer rows than data-parallel processes.
    "sparse": Diet(((glimpse, chat, glimpse), (glimpse,), (revised,), (untaught,), (picture, chat))),
    "any": Diet(),
    "any_windowed": Diet((), _WINDOWED),
}


@cache
def tokenizer() -> StreamTokenizer:
    """The one that is shipped with the package."""
    return load_tokenizer(TokenizerConfig())


def global_batch(diet: str, seed: int, step: int) -> list[RowStream]:
    """The streams of one optimizer step with their frames, uint8 [F, C, H, W]: the same whoever asks."""
    rng = np.random.default_rng([seed, step])
    chosen = DIETS[diet]
    if chosen.steps:
        forms = chosen.steps[step % len(chosen.steps)]
    else:
        forms = tuple(FORMS[index] for index in rng.integers(0, len(FORMS), rng.integers(1, 8)))
    return [_compiled(form, f"{step}.{number}", chosen.compiler, rng) for number, form in enumerate(forms)]


def _compiled(form: Form, key: str, compiler: CompilerConfig, rng: np.random.Generator) -> RowStream:
    sample = parse_sample(form(rng), key)
    media = {
        medium.id: MediaInfo(0.0) if medium.kind == "image" else MediaInfo(60.0, 25.0, 1500) for medium in sample.media
    }
    stream = compile_sample(sample, media, tokenizer(), compiler, rng)
    # Squares of one colour: frames of noise would all look the same to the tower.
    squares = rng.integers(0, 256, (len(stream.frames), 3, _SQUARES, _SQUARES), dtype=np.uint8)
    side = IMAGE_SIZE // _SQUARES
    return stream, torch.from_numpy(squares.repeat(side, axis=2).repeat(side, axis=3))
