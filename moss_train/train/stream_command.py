"""`moss-train stream`: a clip plays, the model watches and says what it has to say, when it has to say it.

Shape suffixes: F frames, C colour channels, H, W pixels.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from moss_train.data.corpus import load_source
from moss_train.data.decoding.decode import decode_frames
from moss_train.data.decoding.probe import probe_media
from moss_train.data.shards.index import KINDS
from moss_train.errors import ConfigError, MossTrainError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.live import LivePrinter, live_schedule, play
from moss_train.report.caption_track import captions_of
from moss_train.report.captions import caption_clip, check_save
from moss_train.streams.schema import StreamSample
from moss_train.train.restore import load_model, stage_of

_QUESTION_STARTS = re.compile(r"(?:^|;)\s*(\d+(?:\.\d+)?)\s*:")


@dataclass
class StreamOptions:
    """What is played to which model."""

    ckpt: str
    """Checkpoint folder, or a stage's or run's folder, whose newest checkpoint is taken."""
    video: str
    """The clip's file."""
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
    """Video file (`out.mp4`) to write: the clip at its own rate, and below it what was said; null writes none."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How replies are read from predictions."""

    def validate(self) -> None:
        self.decode.validate()
        for name, holds, remedy in (
            ("speed", self.speed >= 0, "must not be negative; 0 is as fast as possible"),
            ("fps", self.fps is None or self.fps > 0, "must be above 0, or null"),
            ("max_seconds", self.max_seconds > 0, "must be above 0"),
            ("ask_at_s", self.ask_at_s >= 0, "must not be negative"),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)}: {remedy}")
        if self.save is not None:
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
    """Play a clip in real time and print what the model says; silence is a dot per frame.

    Example: moss-train stream ckpt=outputs/quickstart video=clip.mp4 questions="2:What colour is it?"
    """
    video = Path(options.video)
    if not video.is_file():
        raise ConfigError(f"video={options.video}: there is no such file")
    model, tokenizer, run = load_model(options.ckpt)
    compiler = run.stages[stage_of(options.ckpt)].compiler
    system = options.system if options.system is not None else system_of(run.evaluate.source)
    data = video.read_bytes()
    probe = probe_media(data, video.name)
    if probe.container == "image" or probe.duration_s <= 0:
        raise ConfigError(f"video={options.video}: it is a {probe.codec} without length; give a video")
    duration_s = min(probe.duration_s, options.max_seconds)
    schedule, times_s = live_schedule(
        video.name, options.asked(), system, options.fps or compiler.fps, duration_s, compiler, tokenizer
    )
    frames_FCHW = decode_frames(data, times_s, run.model.vision.image_size, key=video.name).frames
    console = Console(highlight=False)
    shown = f"{video.name}: {duration_s:.1f} s, {len(times_s)} frames. A dot is a frame about which it is silent."
    console.print(Text(shown, "dim"), soft_wrap=True)
    printer = LivePrinter(console, tokenizer)
    result = play(model, tokenizer, compiler, schedule, frames_FCHW, options.speed, options.decode, printer)
    console.print(Text(result.summary(), "dim"), soft_wrap=True)
    if options.save is not None:
        events = captions_of(schedule.steps, result.outputs, tokenizer, compiler.tokens_per_second)
        count = caption_clip(Path(options.save), data, probe, events, duration_s)
        console.print(f"written to {options.save}, {count} pictures", markup=False)
    return 0


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
