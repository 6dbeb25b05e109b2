"""A model that watches and answers live: frames and prompts in, tokens out, each through a queue.

Two threads. *Perception* takes frames in the order in which they come, scales and encodes them (on a CUDA stream of its
own, where there is a GPU). *Speech* feeds tokens and reads predictions, and takes what has arrived between any two of
them (`conversation`). So a frame is encoded while a reply goes on, and the reply's later tokens see it. When there is
nothing to say and nothing arrives, both sleep.

Shape suffixes: C colour channels, H, W pixels.
"""

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from moss_train.data.decoding.pictures import fitted_size, tiled
from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.conversation import ArrivedFrame, Conversation, Said
from moss_train.evaluate.decoder import StreamingDecoder
from moss_train.evaluate.live_figures import LiveFigures
from moss_train.evaluate.sampling import GenerationConfig, Sampler
from moss_train.model.frame_cache import KeepPolicy
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer

_GLANCE_S = 0.05  #: how often speech that waits for room looks whether it shall stop

_LAST = ("end", "error")  #: kinds of `Said` behind which nothing comes

Picture = Image.Image | np.ndarray | torch.Tensor


@dataclass
class LiveConfig:
    """How a live stream is run."""

    tokens_per_second: float | None = None
    """Most tokens a second that a reply is said at; null: `compiler.tokens_per_second`, the rate in training."""
    paced: bool = True
    """Hold the rate of speech; false says a reply as fast as the model can."""
    reply_tokens: int = 1024
    """A reply is closed after so many tokens."""
    slot_tokens: int = 256
    """A reply is closed after so many tokens since the latest frame or prompt: when nothing comes any more it must not
    go on for long."""
    waiting_frames: int = 16
    """Frames that may wait to be seen; when one more comes, the oldest is dropped and counted. Those being encoded, and
    the encoded ones, may be as many again."""
    held_frames: int = 256
    """`compiler.perceive=blocked` alone: encoded frames that may wait for the end of a reply; when one more comes, the
    oldest is dropped and counted. Each takes as much memory as its features."""
    waiting_prompts: int = 64
    """Prompts that may wait; one more is refused with `queue.Full`."""
    waiting_tokens: int = 4096
    """What was said and not fetched yet; when it is as much, speech waits, and frames go on being encoded. 0: no
    limit."""
    silence_after_prompt: bool = False
    """A prompt is answered at the next frame at the earliest, as by the reference's loop."""

    def validate(self) -> None:
        for name, least in (
            ("reply_tokens", 1),
            ("slot_tokens", 1),
            ("waiting_frames", 1),
            ("held_frames", 1),
            ("waiting_prompts", 1),
            ("waiting_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"live.{name}={getattr(self, name)}: must be at least {least}")
        if self.tokens_per_second is not None and self.tokens_per_second <= 0:
            raise ConfigError(f"live.tokens_per_second={self.tokens_per_second}: must be above 0, or null")


@dataclass(frozen=True)
class _Waiting:
    """A picture that is not encoded yet, or a frame that is not read yet."""

    time_s: float
    came_s: float  #: when it was handed over
    content: Any


class LiveSession:
    """One live stream. Use as a context manager:

        with LiveSession(model, tokenizer, compiler) as session:
            session.frame(picture)                  # PIL, uint8 [H, W, 3], or uint8 tensor [3, H, W]; any size
            session.ask("What is happening?")       # at any time, also during a reply
            for said in session.said(): ...         # until `stop`, from this or another thread

    A thread's error ends the session and is raised by the next call. With `threads=False` nothing runs by itself:
    `advance(time_s)` moves a logical clock, for tests and for clips that are played as fast as can be.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: StreamTokenizer,
        compiler: CompilerConfig,
        system: str | None = None,
        config: LiveConfig | None = None,
        decode: DecodeConfig | None = None,
        generation: GenerationConfig | None = None,
        keep: KeepPolicy | None = None,
        image_size: int | None = None,
        threads: bool = True,
        speed: float = 1.0,
    ):
        """`model` is whole and in evaluation mode; `compiler` is that of its training: window, sinks, rate of speech.
        `keep`: which frames stay, other than those of the window. `image_size`: side of the square a picture is fitted
        into, null: the model's; 0 leaves pictures as they are. `speed`: seconds of the threads' clock per second."""
        self.config = config or LiveConfig()
        self.config.validate()
        self._decoder = StreamingDecoder(
            model, tokenizer, compiler, [system], None, None, decode, Sampler(generation or GenerationConfig()), keep
        )
        rate = (self.config.tokens_per_second or compiler.tokens_per_second) if self.config.paced else None
        self._conversation = Conversation(
            self._decoder,
            tokenizer,
            rate,
            self.config.reply_tokens,
            self.config.slot_tokens,
            self.config.silence_after_prompt,
            blocked=compiler.perceive == "blocked",
            held_frames=self.config.held_frames,
        )
        self._rate = rate
        self._size = model.sizes.vision.image_size if image_size is None else image_size
        self._device = next(model.parameters()).device
        self._speed, self._began_s = speed, time.monotonic()
        self._logical_s = 0.0
        self.tokens: queue.Queue[Said] = queue.Queue(self.config.waiting_tokens)
        self.figures = LiveFigures()
        self._changed = threading.Condition()
        self._prompts: deque[_Waiting] = deque()
        self._pictures: deque[_Waiting] = deque()
        self._arrived: deque[_Waiting] = deque()
        self._encoding = False
        self._stopping = self._finishing = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        if threads:
            for work in (self._perceive, self._speak):
                thread = threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
                self._threads.append(thread)
                thread.start()

    def __enter__(self) -> "LiveSession":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.stop()
        else:  # the caller's own error goes on
            with contextlib.suppress(Exception):
                self.stop()

    # What comes in.

    def now_s(self) -> float:
        """Seconds since the session began, on its clock."""
        return (time.monotonic() - self._began_s) * self._speed if self._threads else self._logical_s

    def frame(self, picture: Picture, time_s: float | None = None) -> None:
        """Show a picture; `time_s` is when it was taken, null: now. Returns at once."""
        self._hand_over(self._pictures, picture, time_s)

    def ask(self, text: str) -> None:
        """The user says something. It cuts a running reply. Raises queue.Full when too many prompts wait."""
        if len(self._prompts) >= self.config.waiting_prompts:
            raise queue.Full(f"{self.config.waiting_prompts} prompts wait already")
        self._hand_over(self._prompts, text, None)

    def _hand_over(self, waiting: deque, content: Any, time_s: float | None) -> None:
        self.check()
        now_s = self.now_s()
        with self._changed:
            if self._stopping or self._finishing:
                raise RuntimeError("the session is over; start another one")
            waiting.append(_Waiting(now_s if time_s is None else time_s, now_s, content))
            if waiting is self._pictures:
                self.figures.frames += 1
                self._drop(self._pictures)
            self._changed.notify_all()

    def _drop(self, waiting: deque) -> None:
        while len(waiting) > self.config.waiting_frames:
            waiting.popleft()
            self.figures.dropped += 1

    # What goes out.

    def said(self, timeout_s: float | None = None) -> Iterator[Said]:
        """What is put out, as it comes, until the session is over; `timeout_s` of quiet end it too. Several may listen:
        each thing is told to one of them, the end to all."""
        while True:
            try:
                item = self.tokens.get(timeout=timeout_s)
            except queue.Empty:
                return
            if item.kind in _LAST:
                self._put(item)  # who else listens, or asks again, must hear it too
                self.check()
                return
            yield item

    def check(self) -> None:
        """Raise the error of a thread, if there was one."""
        if self._error is not None:
            raise RuntimeError(f"the live session broke: {self._error}") from self._error

    def stop(self, timeout_s: float = 60.0) -> None:
        """End at once: what waits is not read, the reply breaks off. Raises the error of a thread, if there was one,
        TimeoutError when one still works after `timeout_s`."""
        with self._changed:
            over = self._stopping
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        if not over:
            self._put(Said("end", self.now_s(), self._decoder.frames_of(0)))
        self.check()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                raise TimeoutError(f"thread {thread.name} is still at work after {timeout_s} s")

    def finish(self, timeout_s: float | None = None) -> None:
        """No more comes: wait until all has been read and the reply, if one goes on, is over; then stop. What is said
        must be fetched meanwhile by another thread when it is more than `waiting_tokens`."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()
        if self._threads:
            self._threads[-1].join(timeout_s)
            if self._threads[-1].is_alive():
                raise TimeoutError(f"the reply goes on after {timeout_s} s")
        else:
            if self._pictures or self._prompts:
                self._read_all(self._logical_s)
            while self._conversation.due_s is not None:
                self._tick(max(self._logical_s, self._conversation.due_s), [], [])
        self.stop()

    # The logical clock.

    def advance(self, time_s: float) -> None:
        """Say what is due until `time_s`, then read all that was handed over; only without threads.

        Raises ValueError when the clock would go back, or has no rate of speech.
        """
        if self._threads:
            raise ValueError("advance() is for sessions with threads=False; this one runs by itself")
        if self._rate is None or time_s < self._logical_s:
            raise ValueError(f"advance({time_s}): the clock stands at {self._logical_s} and needs paced=true")
        while (due_s := self._conversation.due_s) is not None and due_s <= time_s + 1e-6 / self._rate:
            self._tick(max(self._logical_s, due_s), [], [])
        self._read_all(time_s)

    def _read_all(self, time_s: float) -> None:
        """Read what was handed over; only without threads."""
        while self._pictures:
            picture = self._pictures.popleft()
            self._arrived.append(self._encoded(picture))
        self._drop(self._arrived)
        prompts, frames = list(self._prompts), list(self._arrived)
        self._prompts.clear()
        self._arrived.clear()
        self._tick(time_s, prompts, frames)

    def _tick(self, now_s: float, prompts: list[_Waiting], frames: list[_Waiting]) -> None:
        self._logical_s = now_s
        started_s = time.perf_counter()
        out = self._conversation.tick(now_s, [p.content for p in prompts], [f.content for f in frames])
        self.figures.held_dropped = self._conversation.held_dropped
        if prompts or frames:
            self.figures.read(
                now_s + time.perf_counter() - started_s,
                [prompt.came_s for prompt in prompts],
                [frame.came_s for frame in frames],
                time.perf_counter() - started_s,
            )
        for said in out:
            self.figures.said(said, self.now_s())
            self._put(said)

    def cache_bytes(self) -> int:
        """Bytes of the caches as they are allocated."""
        return self._decoder.cache_bytes()

    # The threads.

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller, whose thread it must not die in
            with self._changed:
                self._error = self._error or error
                self._stopping = True
                self._changed.notify_all()
            self._put(Said("error", self.now_s(), 0, text=f"{type(error).__name__}: {error}"))

    def _perceive(self) -> None:
        gpu = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if gpu else None
        while True:
            with self._changed:
                while not self._pictures and not self._stopping and not self._finishing:
                    self._changed.wait()
                if self._stopping or not self._pictures:
                    return
                picture = self._pictures.popleft()
                self._encoding = True
            with torch.cuda.stream(stream) if gpu else contextlib.nullcontext():
                arrived = self._encoded(picture)
            if gpu:
                stream.synchronize()  # blocks this thread alone; what is handed over is ready for any stream
                # and its memory is not used again before the stream of speech has read it
                arrived.content.features_PH.record_stream(torch.cuda.default_stream(self._device))
            with self._changed:
                self._encoding = False
                self._arrived.append(arrived)
                self._drop(self._arrived)
                self._changed.notify_all()

    def _encoded(self, waiting: _Waiting) -> _Waiting:
        started_s = time.perf_counter()
        picture_CHW = as_frame(waiting.content, self._size)
        features_PH = self._decoder.encode(picture_CHW[None].to(self._device))[0]
        self.figures.encoded(time.perf_counter() - started_s)
        return _Waiting(waiting.time_s, waiting.came_s, ArrivedFrame(waiting.time_s, features_PH))

    def _speak(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._prompts and not self._arrived:
                    due_s = self._conversation.due_s
                    left_s = math.inf if due_s is None else due_s - self.now_s()
                    if left_s <= 0:
                        break
                    if due_s is None and self._finishing and not self._pictures and not self._encoding:
                        return
                    self._changed.wait(None if math.isinf(left_s) else left_s / self._speed)
                if self._stopping:
                    return
                prompts, frames = list(self._prompts), list(self._arrived)
                self._prompts.clear()
                self._arrived.clear()
            self._tick(self.now_s(), prompts, frames)

    def _put(self, said: Said) -> None:
        last = said.kind in _LAST
        while True:
            try:
                if not self._threads and not last:
                    self.tokens.put_nowait(said)  # raises queue.Full: nobody else could fetch meanwhile
                else:
                    self.tokens.put(said, block=not last, timeout=_GLANCE_S)
                return
            except queue.Full:
                if last:
                    with contextlib.suppress(queue.Empty):
                        self.tokens.get_nowait()  # the end must be heard
                elif not self._threads:
                    raise
                elif self._stopping:
                    return


def as_frame(picture: Picture, size: int) -> torch.Tensor:
    """A picture as training would have shown it: uint8 RGB [3, H, W], fitted into a square of `size` pixels, black
    where it does not reach; size 0 leaves it as it is.

    Raises ValueError when it is none.
    """
    if isinstance(picture, Image.Image):
        pixels_HWC = np.asarray(picture.convert("RGB"))
    elif isinstance(picture, torch.Tensor):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
            raise ValueError(f"a tensor must be uint8 [3, H, W], this is {picture.dtype} {list(picture.shape)}")
        if not size or picture.shape[1:] == (size, size):
            return picture
        pixels_HWC = picture.permute(1, 2, 0).cpu().numpy()
    else:
        pixels_HWC = np.asarray(picture)
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise ValueError(f"an array must be uint8 [H, W, 3], this is {pixels_HWC.dtype} {list(pixels_HWC.shape)}")
    height, width = pixels_HWC.shape[:2]
    if size and fitted_size(width, height, size) != (width, height):
        still = Image.fromarray(pixels_HWC).resize(fitted_size(width, height, size), Image.Resampling.BILINEAR)
        pixels_HWC = np.asarray(still)
    return torch.from_numpy(tiled(pixels_HWC[None], size or None)[0])
