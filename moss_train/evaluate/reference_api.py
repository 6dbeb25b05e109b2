"""The calls of MOSS-Video-Preview's own inference code, on our model: same queues, same signal strings.

What is known of them is in `model_facts.md` E.1 and E.2: the reference's scripts call `real_time_generate` and
`offline_generate` in a thread and read text and signals from a queue. Where the reference hands over a Hugging Face
processor, here a `StreamProcessor` says how texts and pictures become tokens and frames.
"""

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moss_train.data.decoding.decode import decode_frames
from moss_train.data.decoding.probe import probe_media
from moss_train.errors import ConfigError
from moss_train.evaluate.query import Query
from moss_train.evaluate.sampling import GenerationConfig, Sampler
from moss_train.evaluate.stream import LiveConfig, LiveSession, as_frame
from moss_train.streams.config import CompilerConfig
from moss_train.streams.growing_text import GrowingText
from moss_train.streams.media import PLACEHOLDERS, MediaInfo, offline_frame_times
from moss_train.streams.tokenizer import StreamTokenizer

ROUND_START, SILENCE, ROUND_END = "<|round_start|>", "<|silence|>", "<|round_end|>"
DONE, ERROR = "[DONE]", "[ERROR]"
_GLANCE_S = 0.05  #: how often a thread that waits for input looks whether it shall stop
#: keys of an offline query and of what is in it, with the reference's defaults
_QUERY = {"prompt": "", "images": (), "videos": (), "media_kwargs": {}, "generate_kwargs": {}, "thinking_mode": None,
          "system_prompt_type": None, "stop_offline_generate": False}  # fmt: skip
_MEDIA = {"fps": 1.0, "min_frames": 8, "max_frames": 256}
_GENERATE = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_new_tokens": 1024, "repetition_penalty": 1.0,
             "do_sample": True, "seed": 0}  # fmt: skip


@dataclass
class StreamProcessor:
    """Stands where the reference's code takes a Hugging Face processor."""

    tokenizer: StreamTokenizer
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """As in the model's training: windows, rate of speech, frames a second."""
    system: str | None = None
    """System prompt."""
    systems: dict[str, str] = field(default_factory=dict)
    """System prompts by a query's `system_prompt_type` (`video`, `text_image`); those not named take `system`."""
    live: LiveConfig = field(default_factory=lambda: LiveConfig(silence_after_prompt=True, paced=False))
    """How a live stream is run. As in the reference, silence is forced after a prompt and nothing holds the rate."""


class ReferenceApi:
    """`model` with the reference's calls. One `real_time_generate` or `offline_generate` at a time."""

    def __init__(self, model: Any):
        self._model = model
        self._stop = threading.Event()

    def real_time_generate(
        self,
        image_queue: queue.Queue,
        prompt_queue: queue.Queue,
        token_queue: queue.Queue,
        processor: StreamProcessor,
        max_new_tokens: int = 86400,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Watch and answer until `stop_real_time_generate` or `max_new_tokens`; blocks, so it runs in a thread.

        `image_queue` gives pictures (PIL, uint8 [H, W, 3]) as they come, `prompt_queue` texts. `token_queue` gets
        pieces of text and the signals: `<|round_start|>` when a prompt was read (what was being said breaks off),
        `<|silence|>` at each decision to be silent and behind each reply, `<|round_end|>` when `max_new_tokens` were
        said, and last `[DONE]`, or `[ERROR]` before an error is raised here.
        """
        self._stop.clear()
        generation = _generation(do_sample, temperature, top_k, top_p, repetition_penalty, seed)
        try:
            session = LiveSession(
                self._model, processor.tokenizer, processor.compiler, processor.system, processor.live,
                generation=generation,
            )  # fmt: skip
            with session:
                feeders = [
                    threading.Thread(target=self._feed, args=pair, daemon=True)
                    for pair in ((image_queue, session.frame), (prompt_queue, session.ask))
                ]
                for feeder in feeders:
                    feeder.start()
                try:
                    self._pass_on(session, token_queue, max_new_tokens)
                finally:
                    self._stop.set()
                    for feeder in feeders:
                        feeder.join()
        except Exception:
            token_queue.put(ERROR)
            raise
        token_queue.put(DONE)

    def stop_real_time_generate(self) -> None:
        """End a running `real_time_generate` or `offline_generate`."""
        self._stop.set()

    def _feed(self, source: queue.Queue, hand_over: Any) -> None:
        while not self._stop.is_set():
            try:
                item = source.get(timeout=_GLANCE_S)
            except queue.Empty:
                continue
            while not self._stop.is_set():
                try:
                    hand_over(item)
                    break
                except queue.Full:
                    self._stop.wait(_GLANCE_S)
                except RuntimeError:
                    return  # the session is over; whoever reads from it is told why

    def _pass_on(self, session: LiveSession, token_queue: queue.Queue, max_new_tokens: int) -> None:
        said_tokens = 0
        while not self._stop.is_set():
            for said in session.said(_GLANCE_S):
                if said.kind == "turn":
                    token_queue.put(ROUND_START)
                elif said.kind == "silence":
                    token_queue.put(SILENCE)
                elif said.kind == "token":
                    said_tokens += 1
                    if said.text:
                        token_queue.put(said.text)
                    if said_tokens >= max_new_tokens:
                        token_queue.put(ROUND_END)
                        return
                if self._stop.is_set():
                    return

    def offline_generate(
        self,
        processor: StreamProcessor,
        new_queries: queue.Queue,
        out_queue: queue.Queue,
        vision_chunked_length: int = 64,
    ) -> None:
        """Answer queries until one says `{"stop_offline_generate": True}`, or `stop_real_time_generate`; blocks.

        A query is a dict: `prompt`, `images` and `videos` (files, or pictures and lists of them), `media_kwargs` (`fps`
        1, `min_frames` 8, `max_frames` 256), `generate_kwargs` (`temperature` 1, `top_k` 50, `top_p` 1,
        `max_new_tokens` 1024, `do_sample`), `system_prompt_type`. Media stand where the prompt has `<|video|>` and
        `<|image|>`, or before it. `out_queue` gets for each `<|round_start|>`, the answer in pieces, `<|round_end|>`;
        last `[DONE]`, or `[ERROR]` before an error is raised here. `vision_chunked_length` frames are encoded at once.
        """
        self._stop.clear()
        try:
            while not self._stop.is_set():
                try:
                    query = new_queries.get(timeout=_GLANCE_S)
                except queue.Empty:
                    continue
                query = _filled("query", query, _QUERY)
                if query["stop_offline_generate"]:
                    break
                self._answer(processor, query, out_queue, vision_chunked_length)
        except Exception:
            out_queue.put(ERROR)
            raise
        out_queue.put(DONE)

    def _answer(self, processor: StreamProcessor, query: dict[str, Any], out_queue: queue.Queue, at_once: int) -> None:
        if query["thinking_mode"] not in (None, False, "no_thinking"):
            raise ConfigError(f"thinking_mode={query['thinking_mode']!r}: this model has none; leave it out")
        generate = _filled("generate_kwargs", query["generate_kwargs"], _GENERATE)
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        sampler = Sampler(_generation(*(generate[name] for name in names)))
        parts = self._parts(query)
        system = processor.systems.get(query["system_prompt_type"], processor.system)
        row = Query(self._model, processor.tokenizer, processor.compiler, parts, system)
        out_queue.put(ROUND_START)
        said = GrowingText(processor.tokenizer)
        for token in row.answer(sampler, generate["max_new_tokens"], at_once):
            if new := said.add(token):
                out_queue.put(new)
            if self._stop.is_set():
                break
        out_queue.put(ROUND_END)

    def _parts(self, query: dict[str, Any]) -> list[str | torch.Tensor]:
        size = self._model.sizes.vision.image_size
        media = _filled("media_kwargs", query["media_kwargs"], _MEDIA)
        waiting = {
            "image": [_still(image, size) for image in query["images"]],
            "video": [_video(video, size, media) for video in query["videos"]],
        }
        prompt = query["prompt"]
        found = {kind: prompt.count(placeholder) for kind, placeholder in PLACEHOLDERS.items()}
        if not any(found.values()):
            prompt = "".join(PLACEHOLDERS[kind] * len(of_kind) for kind, of_kind in waiting.items()) + prompt
        elif any(found[kind] != len(of_kind) for kind, of_kind in waiting.items()):
            given = {kind: len(of_kind) for kind, of_kind in waiting.items()}
            raise ConfigError(f"prompt: shows {found}, but {given} are given; name each in its place, or none")
        parts: list[str | torch.Tensor] = []
        while True:
            places = {kind: prompt.find(placeholder) for kind, placeholder in PLACEHOLDERS.items()}
            places = {kind: place for kind, place in places.items() if place >= 0}
            if not places:
                return [*parts, prompt]
            kind = min(places, key=lambda kind: places[kind])
            parts += [prompt[: places[kind]], waiting[kind].pop(0)]
            prompt = prompt[places[kind] + len(PLACEHOLDERS[kind]) :]


def _generation(
    do_sample: bool, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seed: int
) -> GenerationConfig:
    if repetition_penalty != 1.0:
        raise ConfigError(f"repetition_penalty={repetition_penalty}: only 1.0, which is none, is offered")
    if not do_sample:
        return GenerationConfig(seed=seed)
    return GenerationConfig(temperature, top_k, top_p, seed)


def _filled(what: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(f"{what}: no such key {', '.join(unknown)}; there are {', '.join(defaults)}")
    return defaults | given


def _still(image: Any, size: int) -> torch.Tensor:
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    return as_frame(image, size)[None]


def _video(video: Any, size: int, media: dict[str, Any]) -> torch.Tensor:
    if not isinstance(video, (str, Path)):
        frames = torch.stack([as_frame(picture, size) for picture in video])
        chosen = np.linspace(0, len(frames) - 1, min(len(frames), media["max_frames"])).round().astype(int)
        return frames[torch.from_numpy(chosen)]
    data, name = Path(video).read_bytes(), Path(video).name
    facts = probe_media(data, name)
    info = MediaInfo(facts.duration_s, facts.frame_rate, facts.frame_count)
    times_s = offline_frame_times(info, media["fps"], media["min_frames"], media["max_frames"])
    return decode_frames(data, times_s, size, key=name, facts=facts).frames
