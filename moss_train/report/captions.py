"""A clip with what the user and the model say burnt in below the picture, as a video file: `write_captioned_video`.

Below the picture stand, from top to bottom, a line that fills as the clip goes on (grey silence, blue speech, orange
revision, violet where the user spoke), what the model is doing and the time, the user's words, the answer that was
taken back, struck through, and the model's words as they come.

Shape suffixes: F frames, H, W pixels, C colour channels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.decoding.pyav_reader import each_picture
from moss_train.errors import ConfigError
from moss_train.report.caption_fonts import Lettering, fonts_for
from moss_train.report.caption_track import MODES, CaptionEvent, CaptionTrack, Shown
from moss_train.report.palette import DARK

#: pixels: a smaller picture is enlarged to the least height, a larger one is reduced to the most
_LEAST_HEIGHT, _LEAST_WIDTH, _MOST_HEIGHT, _MOST_WIDTH = 480, 480, 1080, 1920
#: lines of text at most; of longer replies the last ones are seen
_USER_LINES, _OLD_LINES, _REPLY_LINES = 2, 1, 3
#: letters that are more than those lines; of a reply that is longer than two of these the first ones go, all at once,
#: so that its lines break where they did
_BLOCK_LETTERS = 400
_TICKS_PER_S = 90_000
_BT601 = 5  #: FFmpeg's number of the colour space, written into the file so that every player takes the same
_MARKS = {"silence": "·", "speak": "●", "revise": "◆"}
_INKS = {"silence": DARK["muted"], "speak": "#7fb0ff", "revise": DARK["revise-text"]}
_FILLS = {"silence": "#3a4652", "speak": DARK["speak"], "revise": DARK["revise"]}


def _rgb(colour: str) -> np.ndarray:
    return np.array(ImageColor.getrgb(colour), np.uint8)


_MODE_COLOURS = np.stack([_rgb(_FILLS[mode]) for mode in MODES])


def write_captioned_video(
    path: Path,
    frames: Iterable[tuple[float, np.ndarray]],
    events: Sequence[CaptionEvent],
    end_s: float | None = None,
    fonts: Sequence[Path] | None = None,
) -> int:
    """Write an mp4 (H.264, 4:2:0, index at the front, no sound), whole or not at all.

    Args:
        path: of the file.
        frames: (seconds, uint8 RGB [H, W, 3]) of every picture, in order; each keeps its time.
        events: what is said, see `CaptionEvent`; in any order, times in seconds of the clip.
        end_s: when the clip ends; None shows the last picture as long as the one before it.
        fonts: asked in this order for each letter; None takes DejaVu Sans and what the system has.

    Returns the number of pictures written. Raises ConfigError when PyAV is missing or has no H.264 encoder, ValueError
    without a picture or when times do not increase.
    """
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise ConfigError("writing a video needs PyAV: install moss_train[video]") from error
    track, stage, count, stamp, step = CaptionTrack(events), None, 0, -1, _TICKS_PER_S // 25
    partial = path.with_name(path.name + ".partial")
    held, reformatter = None, VideoReformatter()
    try:
        with av.open(partial, "w", format="mp4", options={"movflags": "faststart"}) as container:
            for time_s, picture_HWC in frames:
                if stage is None:
                    stage = Stage.of(picture_HWC.shape[1], picture_HWC.shape[0], track, end_s, fonts)
                    stream = _add_stream(container, stage)
                frame = reformatter.reformat(
                    av.VideoFrame.from_ndarray(stage.draw(picture_HWC, time_s), format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=_BT601,
                )
                now = round(time_s * _TICKS_PER_S)
                if now <= stamp:
                    raise ValueError(f"the picture at {time_s:g} s does not come after the one before it")
                step = now - stamp if stamp >= 0 else step
                frame.pts, frame.time_base, stamp, count = now, Fraction(1, _TICKS_PER_S), now, count + 1
                held = _mux_but_last(container, held, stream.encode(frame))
            if stage is None:
                raise ValueError("a video needs at least one picture")
            held = _mux_but_last(container, held, stream.encode())
            # Nothing follows the last picture that would say how long it is shown.
            held.duration = max(1, step if end_s is None else round(end_s * _TICKS_PER_S) - stamp)
            container.mux(held)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def caption_clip(path: Path, data: bytes, facts: MediaProbe, events: Sequence[CaptionEvent], until_s: float) -> int:
    """`write_captioned_video` of a video file's bytes: every picture before `until_s`, at its own time."""
    pictures = ((time_s, picture) for time_s, picture in each_picture(data, facts, path.name) if time_s < until_s)
    return write_captioned_video(path, pictures, events, min(until_s, facts.duration_s))


def check_save(save: str, video: str) -> None:
    """Raise ConfigError unless `save` may be written: an mp4 file in a folder that exists, and not the clip itself."""
    path = Path(save)
    if path.suffix.lower() != ".mp4":
        raise ConfigError(f"save={save}: videos are written as mp4; name a file that ends in .mp4")
    if not path.parent.is_dir():
        raise ConfigError(f"save={save}: there is no folder {path.parent}")
    if path.exists() and Path(video).exists() and path.samefile(video):
        raise ConfigError(f"save={save}: that is the clip itself; name another file")


def at_rate(frames_FHWC: np.ndarray, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """Pictures of a constant rate with their times."""
    for number, frame_HWC in enumerate(frames_FHWC):
        yield number / fps, frame_HWC


@dataclass
class Stage:
    """Where everything is drawn; all pictures of a video have its size."""

    width: int
    height: int
    picture: tuple[int, int, int, int]  #: left, top, width, height
    panel: int  #: top of what stands below the picture
    lines: tuple[int, int, int]  #: reserved for the user, the old answer and the reply
    track: CaptionTrack
    letters: Lettering
    small: Lettering
    length_s: float  #: that the line stands for; it grows with the clip where its length is not known
    wrapped: list[tuple[list[str], list[str], list[str]]] = field(default_factory=list)  #: lines of each state
    _words: tuple[int, np.ndarray] | None = None  #: the words as last drawn, by the state's index

    @classmethod
    def of(
        cls,
        width: int,
        height: int,
        track: CaptionTrack,
        end_s: float | None = None,
        fonts: Sequence[Path] | None = None,
    ) -> "Stage":
        """For pictures of `width` × `height`."""
        scale = min(max(1.0, _LEAST_HEIGHT / height), _MOST_WIDTH / width)
        scale = min(scale, _MOST_HEIGHT / height)
        shown_width, shown_height = (max(2, 2 * round(side * scale / 2)) for side in (width, height))
        canvas_width, panel = _even(max(_LEAST_WIDTH, shown_width)), _even(max(_LEAST_HEIGHT, shown_height))
        words = "".join(state.user + state.old + state.text for state in track.states)
        paths = fonts_for("".join(sorted(set(words)))) if fonts is None else list(fonts)
        size = int(min(40, max(17, min(canvas_width / 26, panel / 20))))
        letters, small = Lettering(paths, size), Lettering(paths, max(14, round(0.8 * size)))
        length_s = track.states[-1].time_s if end_s is None else end_s
        stage = cls(canvas_width, 0, (0, 0, 0, 0), panel, (0, 0, 0), track, letters, small, length_s)
        stage.picture = ((canvas_width - shown_width) // 2, (panel - shown_height) // 2, shown_width, shown_height)
        stage.wrapped = [stage._wrap(state) for state in track.states]
        stage.lines = tuple(max(map(len, parts)) for parts in zip(*stage.wrapped, strict=True))
        user, old, reply = stage.lines
        rows = user * letters.height + old * small.height + max(1, reply) * letters.height
        stage.height = _even(panel + stage._bar + stage._status + rows + round(0.7 * size))
        return stage

    @property
    def _bar(self) -> int:
        return max(4, self.letters.size // 4)

    @property
    def _status(self) -> int:
        return self.small.height + self.letters.size // 2

    @property
    def _margin(self) -> int:
        return self.letters.size // 2 + 2

    def draw(self, picture_HWC: np.ndarray, time_s: float) -> np.ndarray:
        """uint8 RGB [height, width, 3]: the picture with what is said at `time_s`."""
        left, top, width, height = self.picture
        if picture_HWC.shape[:2] != (height, width):
            image = Image.fromarray(np.ascontiguousarray(picture_HWC))
            picture_HWC = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        index = self.track.index_at(time_s)
        if self._words is None or self._words[0] != index:
            self._words = (index, self._draw_words(index))
        canvas_HWC = np.zeros((self.height, self.width, 3), np.uint8)
        canvas_HWC[top : top + height, left : left + width] = picture_HWC
        words_top = self.panel + self._bar + self._status
        canvas_HWC[self.panel : words_top] = self._draw_status(self.track.states[index], time_s)
        canvas_HWC[words_top:] = self._words[1]
        return canvas_HWC

    def _draw_status(self, state: Shown, time_s: float) -> np.ndarray:
        """The line that fills with time, what the model is doing, and the time."""
        image = Image.new("RGB", (self.width, self._bar + self._status), DARK["back"])
        image.paste(Image.fromarray(self._line(time_s)), (0, 0))
        draw = ImageDraw.Draw(image)
        top = self._bar + self.letters.size // 4
        names = {"silence": f"silent {int(max(0.0, time_s - state.mode_since_s))} s", "speak": "speaks"}
        name = names.get(state.mode, "revises its answer")
        self.small.draw(draw, self._margin, top, f"{_MARKS[state.mode]} {name}", _INKS[state.mode])
        minutes, tenths = divmod(int(10 * time_s + 1e-6), 600)
        code = f"{minutes}:{tenths / 10:04.1f}"
        self.small.draw(draw, self.width - self._margin - self.small.width(code), top, code, DARK["muted"])
        return np.asarray(image)

    def _line(self, time_s: float) -> np.ndarray:
        """uint8 RGB [bar, width, 3]: all that was until `time_s`, each pixel looked up by the time it stands for, so
        that a picture late in a long clip takes no longer than its first."""
        second = self.width / max(self.length_s, time_s, 1e-9)  # in pixels
        columns = np.arange(self.width + 1)
        edges_s = np.minimum(columns / second, time_s)
        colours_C3 = _MODE_COLOURS[self.track.modes_between(edges_s)]
        colours_C3[edges_s[:-1] >= time_s] = _rgb(DARK["silence"])
        # a mark is four pixels wide; what is said at this very moment is marked already
        begins_s, ends_s = (columns[:-1] - 2) / second, np.minimum((columns[:-1] + 2) / second, time_s + 1e-9)
        colours_C3[self.track.asked_between(begins_s, ends_s)] = _rgb(DARK["user"])
        return np.broadcast_to(colours_C3, (self._bar, self.width, 3)).copy()

    def _draw_words(self, index: int) -> np.ndarray:
        state = self.track.states[index]
        top = self.panel + self._bar + self._status
        image = Image.new("RGB", (self.width, self.height - top), DARK["back"])
        draw, y = ImageDraw.Draw(image), 0.0
        user, old, reply = self.wrapped[index]
        for line in user:
            self.letters.draw(draw, self._margin, y, line, DARK["user"])
            y += self.letters.height
        y = self.lines[0] * self.letters.height
        for line in old:
            end = self.small.draw(draw, self._margin, y, line, DARK["muted"])
            if not state.cut:
                middle = y + 0.56 * self.small.height
                draw.line((self._margin, middle, end, middle), DARK["revise-text"], max(1, self.small.size // 10))
            y += self.small.height
        y = self.lines[0] * self.letters.height + self.lines[1] * self.small.height
        for line in reply:
            self.letters.draw(draw, self._margin, y, line, DARK["revise-text"] if state.revised else DARK["ink"])
            y += self.letters.height
        return np.asarray(image)

    def _wrap(self, state: Shown) -> tuple[list[str], list[str], list[str]]:
        """Lines of the user's words, the old answer and the reply."""
        width = self.width - 2 * self._margin
        old = f"cut off: {state.old}" if state.cut else state.old
        start = max(0, len(state.text) // _BLOCK_LETTERS - 1) * _BLOCK_LETTERS
        reply = self.letters.wrapped(state.text[start:], width)
        return (
            self._first(self.letters, f"“{state.user}”" if state.user else "", _USER_LINES),
            self._first(self.small, old, _OLD_LINES),
            reply[-_REPLY_LINES:],
        )

    def _first(self, letters: Lettering, text: str, lines: int) -> list[str]:
        """The first lines of a text, with "…" where some are left out."""
        width = self.width - 2 * self._margin
        wrapped = letters.wrapped(text[:_BLOCK_LETTERS], width)
        if len(wrapped) <= lines and len(text) <= _BLOCK_LETTERS:
            return wrapped
        last = wrapped[lines - 1]
        while last and letters.width(last.rstrip() + " …") > width:
            last = last[:-1]
        return [*wrapped[: lines - 1], last.rstrip() + " …"]


def _even(number: int) -> int:
    return number + number % 2


def _add_stream(container: Any, stage: Stage) -> Any:
    import av

    # No pictures that refer to later ones, so that packets come in the order in which they are shown.
    options = {"preset": "veryfast", "crf": "20", "bf": "0"}
    try:
        stream = container.add_stream("libx264", rate=Fraction(25), options=options)
    except av.codec.codec.UnknownCodecError as error:
        raise ConfigError("this build of PyAV has no libx264, with which videos are written") from error
    stream.width, stream.height, stream.pix_fmt = stage.width, stage.height, "yuv420p"
    stream.codec_context.time_base = Fraction(1, _TICKS_PER_S)
    stream.codec_context.colorspace = _BT601
    return stream


def _mux_but_last(container: Any, held: Any, packets: Sequence[Any]) -> Any:
    """Write the packets before the last, which is returned and written when it is known what follows it."""
    for packet in packets:
        if held is not None:
            container.mux(held)
        held = packet
    return held
