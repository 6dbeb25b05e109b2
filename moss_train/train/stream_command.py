"""`moss-train stream`: a clip plays, the model watches and says what it has to say, when it has to say it.

Shape suffixes: F frames, C colour channels, H, W pixels.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from moss_train.cli_options import overrides_of
from moss_train.data.corpus import load_source
from moss_train.data.decoding.decode import decode_frames
from moss_train.data.decoding.probe import probe_media
from moss_train.data.live_sources import endless_pictures, folder_pictures, is_endless
from moss_train.data.shards.index import KINDS
from moss_train.errors import ConfigError, MossTrainError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.live import LivePrinter, live_schedule, play
from moss_train.evaluate.play_live import LiveEvent, play_live
from moss_train.evaluate.sampling import GenerationConfig, Sampler
from moss_train.evaluate.schedule import Schedule, Step
from moss_train.evaluate.stream import LiveConfig, LiveSession
from moss_train.model.video_model import VideoModel
from moss_train.redact import covered
from moss_train.report.caption_track import CaptionEvent, captions_of
from moss_train.report.captions import at_rate, caption_clip, check_save, write_captioned_video
from moss_train.streams.config import CompilerConfig
from moss_train.streams.schema import StreamSample
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.given_settings import check_decode, decode_settings, told
from moss_train.train.restore import load_model, stage_of

_QUESTION_STARTS = re.compile(r"(?:^|;)\s*(\d+(?:\.\d+)?)\s*:")


@dataclass
class StreamOptions:
    """What is played to which model."""

    ckpt: str
    """Checkpoint folder, or a stage's or run's folder, whose newest checkpoint is taken."""
    video: str
    """The clip's file; a folder of pictures, shown in the order of their names; or what has no known length: a URL
    (`rtsp://…`, `http://…`, `file:…`) or a camera (`/dev/video0`), which Ctrl-C ends."""
    question: str | None = None
    """Asked at `ask_at_s`."""
    ask_at_s: float = 0.0
    """When `question` is asked, in seconds of the clip."""
    questions: str | None = None
    """Several questions with their times in seconds: `4:What colour is it?;9:Where is it?`"""
    system: str | None = None
    """System prompt; null takes the one of the streams the run is evaluated on, empty means none."""
    fps: float | None = None
    """Frames a second that the model sees; null takes those of its training."""
    speed: float = 1.0
    """Seconds of the clip per second; 0 plays as fast as the model can."""
    max_seconds: float = 300.0
    """The clip is cut after this many seconds."""
    save: str | None = None
    """Video file (`out.mp4`) to write: the clip at its own rate, and below it what was said; null writes none. Not of a
    camera or a URL."""
    window: int | None = None
    """Frames that a token sees and the cache keeps; null: as in training, 0: all."""
    sinks: int | None = None
    """First frames that stay beside the window; null: as in training."""
    text_window: int | None = None
    """Tokens that a token sees and the cache keeps; null: as in training, 0: all."""
    text_sinks: int | None = None
    """First tokens that stay beside the text window; null: as in training."""
    decode: dict[str, Any] = overrides_of(DecodeConfig)
    """How replies are read from predictions, where it is to differ from the run's `evaluate.decode`."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How tokens are drawn; the default takes the most probable one."""

    def validate(self) -> None:
        check_decode(self.decode)
        self.generation.validate()
        for name, holds, remedy in (
            ("speed", self.speed >= 0, "must not be negative; 0 is as fast as possible"),
            ("fps", self.fps is None or self.fps > 0, "must be above 0, or null"),
            ("max_seconds", self.max_seconds > 0, "must be above 0"),
            (
                "speed",
                self.speed > 0 or not is_endless(self.video),
                "a camera or a URL is played in time; set it above 0",
            ),
            ("ask_at_s", self.ask_at_s >= 0, "must not be negative"),
            ("ask_at_s", self.ask_at_s == 0 or self.question is not None, "there is nothing to ask; give question=…"),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)}: {remedy}")
        if self.save is not None:
            if is_endless(self.video):
                raise ConfigError(f"save={self.save}: a camera or a URL is not kept while it is played; leave it out")
            check_save(self.save, self.video)
        self.asked()

    def asked(self) -> list[tuple[float, str]]:
        """All questions with their times, in order."""
        found = [] if self.question is None else [(self.ask_at_s, self.question)]
        if self.questions is not None:
            starts = list(_QUESTION_STARTS.finditer(self.questions))
            if not starts or starts[0].start() != 0:
                raise ConfigError(
                    f"questions={self.questions!r}: write times and questions as 4:What colour is it?;9:Where is it?"
                )
            for start, following in zip(starts, [*starts[1:], None], strict=True):
                text = self.questions[start.end() : following.start() if following else None].strip()
                found.append((float(start[1]), text))
        return sorted(found, key=lambda item: item[0])


def stream_command(options: StreamOptions) -> int:
    """Play a clip in real time and print what the model says; silence is a dot per frame. What it took is printed last.

    Example: moss-train stream ckpt=outputs/quickstart video=clip.mp4 questions="2:What colour is it?"
    """
    if not is_endless(options.video) and not Path(options.video).exists():
        raise ConfigError(f"video={options.video}: there is no such file")
    model, tokenizer, run = load_model(options.ckpt)
    compiler = served_compiler(options, run.stages[stage_of(options.ckpt)].compiler)
    system = options.system if options.system is not None else system_of(run.evaluate.source)
    console = Console(highlight=False)
    decode = decode_settings(run.evaluate.decode, options.decode)
    console.print(Text(told("decode", decode, options.decode), "dim"), soft_wrap=True)
    player = _Player(options, model, tokenizer, compiler, decode, system, console)
    if is_endless(options.video):
        player.endless()
    else:
        player.clip(read_clip(options, player.fps, run.model.vision.image_size))
    return 0


@dataclass(frozen=True)
class Clip:
    """What is played, with a beginning and an end."""

    name: str
    duration_s: float
    frames_at: Callable[[Sequence[float]], torch.Tensor]  #: seconds to uint8 [F, 3, H, W]
    save: Callable[[Path, Sequence[CaptionEvent]], int]  #: writes it with captions; returns the number of pictures


def read_clip(options: StreamOptions, fps: float, size: int) -> Clip:
    """A video file, or the pictures of a folder, each of which is shown for 1 / fps seconds."""
    path = Path(options.video)
    if path.is_dir():
        frames_FCHW = folder_pictures(path, size)[: max(1, int(options.max_seconds * fps))]
        duration_s = len(frames_FCHW) / fps

        def save_pictures(out: Path, events: Sequence[CaptionEvent]) -> int:
            return write_captioned_video(out, at_rate(frames_FCHW.permute(0, 2, 3, 1).numpy(), fps), events, duration_s)

        return Clip(path.name, duration_s, lambda times_s: frames_FCHW, save_pictures)
    data = path.read_bytes()
    facts = probe_media(data, path.name)
    if facts.container == "image" or facts.duration_s <= 0:
        raise ConfigError(f"video={options.video}: it is a {facts.codec} without length; give a video")
    until_s = min(facts.duration_s, options.max_seconds)
    return Clip(
        path.name,
        until_s,
        lambda times_s: decode_frames(data, times_s, size, key=path.name).frames,
        lambda out, events: caption_clip(out, data, facts, events, until_s),
    )


class _Player:
    """Plays one source to the model, and prints."""

    def __init__(
        self,
        options: StreamOptions,
        model: VideoModel,
        tokenizer: StreamTokenizer,
        compiler: CompilerConfig,
        decode: DecodeConfig,
        system: str | None,
        console: Console,
    ):
        self._options, self._model, self._tokenizer = options, model, tokenizer
        self._compiler, self._decode, self._system, self._console = compiler, decode, system, console
        self._printer = LivePrinter(console, tokenizer)
        self.fps = options.fps or compiler.fps

    def clip(self, clip: Clip) -> None:
        """A clip whose events are known beforehand."""
        options, compiler = self._options, self._compiler
        schedule, times_s = live_schedule(
            clip.name, options.asked(), self._system, self.fps, clip.duration_s, compiler, self._tokenizer
        )
        frames_FCHW = clip.frames_at(times_s)
        self._tell(
            f"{clip.name}: {clip.duration_s:.1f} s, {len(times_s)} frames. A dot is a frame about which it is silent."
        )
        if options.speed > 0:
            result = play_live(self._session(), events_of(schedule, frames_FCHW), self._printer, options.speed)
            steps, outputs, token_times_s = result.as_heard()
        else:
            result = play(
                self._model, self._tokenizer, compiler, schedule, frames_FCHW, 0.0, self._decode, self._printer,
                choose=Sampler(options.generation),
            )  # fmt: skip
            steps, outputs, token_times_s = schedule.steps, result.outputs, None
        self._tell(result.summary())
        if options.save is not None:
            events = captions_of(steps, outputs, self._tokenizer, compiler.tokens_per_second, token_times_s)
            count = clip.save(Path(options.save), events)
            self._console.print(f"written to {options.save}, {count} pictures", markup=False)

    def endless(self) -> None:
        """A source that ends when it ends."""
        options = self._options
        pictures = endless_pictures(options.video, self.fps, options.max_seconds)
        self._tell(f"{covered(options.video)}: {self.fps:g} frames a second. Ctrl-C ends it.")
        result = play_live(self._session(), in_order(pictures, options.asked()), self._printer, options.speed)
        self._tell(result.summary())

    def _session(self) -> LiveSession:
        options = self._options
        in_a_slot = int(self._compiler.tokens_per_second / self.fps) + 1
        config = LiveConfig(slot_tokens=max(self._decode.last_slot_tokens, 2 * in_a_slot))
        return LiveSession(
            self._model, self._tokenizer, self._compiler, self._system, config, self._decode, options.generation,
            speed=options.speed,
        )  # fmt: skip

    def _tell(self, line: str) -> None:
        self._console.print(Text(line, "dim"), soft_wrap=True)


def served_compiler(options: StreamOptions, trained: CompilerConfig) -> CompilerConfig:
    """How the stream is laid out: as in training, but for the windows that the options change."""
    changes = {
        name: (value or None) if name in ("window", "text_window") else value
        for name in ("window", "sinks", "text_window", "text_sinks")
        if (value := getattr(options, name)) is not None
    }
    for window, sinks in (("window", "sinks"), ("text_window", "text_sinks")):
        if window in changes and changes[window] is None:
            changes.setdefault(sinks, 0)  # there is no window beside which they would stay
    compiler = replace(trained, **changes)
    compiler.validate()
    return compiler


def events_of(schedule: Schedule, frames_FCHW: torch.Tensor) -> Iterator[LiveEvent]:
    """The events of a clip with their pictures."""
    frame = 0
    for step in schedule.steps:
        yield LiveEvent(step, None if step.user is not None else frames_FCHW[frame])
        frame += step.user is None


def in_order(
    pictures: Iterable[tuple[float, np.ndarray]], questions: Sequence[tuple[float, str]]
) -> Iterator[LiveEvent]:
    """Pictures and questions as their times come; a question is asked just before the first picture after it."""
    waiting = list(questions)
    for time_s, picture in pictures:
        while waiting and waiting[0][0] <= time_s:
            asked_s, text = waiting.pop(0)
            yield LiveEvent(Step(asked_s, math.inf, text))
        yield LiveEvent(Step(time_s, math.inf, None), picture)


def system_of(source: str | None) -> str | None:
    """The system prompt of the first stream of a packed source; None when there is neither."""
    if source is None or not Path(source).is_dir():
        return None
    try:
        corpus = load_source(source)
        streams = np.flatnonzero(corpus.index.kinds == KINDS.index("stream"))
        sample = corpus.sample(int(streams[0])) if len(streams) else None
    except MossTrainError:
        return None  # only a default is sought; whoever evaluates on the source learns what is wrong with it
    return sample.system if isinstance(sample, StreamSample) else None
