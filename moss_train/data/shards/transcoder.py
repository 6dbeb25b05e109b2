"""Transcoding the clips of a whole source: by processes that can be killed, and going on after an interruption.

What became of a clip is stored as soon as it is known, under a name made of where the clip lies and how it is
rewritten, in a folder beside the packed source that is removed when that stands.
"""

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from moss_train.data.decoding.job import read_range, run_job
from moss_train.data.decoding.pool import DecodeFailure, DecodePool
from moss_train.data.progress import progress_bar
from moss_train.data.shards.pack_input import Piece
from moss_train.data.shards.storage import ShardStore, is_remote
from moss_train.data.shards.transcode import ClipFigures, TranscodeConfig, transcode_clip
from moss_train.errors import SampleError
from moss_train.streams.schema import Sample, StreamSampling

#: most memory of a process that transcodes, MiB
PROCESS_MEMORY_MB = 8192

#: key of the sample, name of the member, where its bytes lie
Clip = tuple[str, str, Piece]

#: clips begun for each process, so that none waits for the next
_CLIPS_AHEAD = 3


@dataclass(frozen=True)
class TranscodeJob:
    """One clip, which is bytes `offset … offset + size` of a file; the new one is written to `out`."""

    KIND: ClassVar[str] = "transcode"
    WHAT: ClassVar[str] = "transcoding"

    key: str
    shard: str  #: path or URL
    offset: int
    size: int
    out: str
    config: TranscodeConfig
    shard_size: int | None = None  #: bytes of the whole file

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "TranscodeJob":
        return TranscodeJob(**entry | {"config": TranscodeConfig(**entry["config"])})

    def run(self) -> ClipFigures:
        data, figures = transcode_clip(read_range(Path(self.shard), self.offset, self.size), self.key, self.config)
        if figures.rewritten:
            _write(Path(self.out), data)
        # After the clip, so that figures are never without it.
        _write(_figures_file(Path(self.out)), json.dumps(figures.to_json()).encode())
        return figures

    def result(self, entry: Any) -> ClipFigures:
        return ClipFigures(**entry)


@dataclass
class TranscodeSummary:
    """What became of all clips."""

    config: TranscodeConfig
    clips: list[tuple[str, ClipFigures]] = field(default_factory=list)  #: with the key of the sample
    failed: int = 0  #: clips that cannot be decoded
    off_grid: int = 0  #: samples that show pictures at other moments than k / fps

    def lines(self) -> list[str]:
        """The summary in lines of text."""
        config, new = self.config, [(key, figures) for key, figures in self.clips if figures.rewritten]
        quality = f"crf {config.crf}" if config.codec == "h264" else f"qscale {config.qscale}"
        same = len(self.clips) - len(new)
        lines = [
            f"transcoded {_count(len(new), 'clip')} to {config.fps:g} pictures a second of {config.size} pixels, "
            f"a keyframe every {config.keyframe_gap if config.codec == 'h264' else 1} ({config.codec}, {quality})"
            + (f"; {same} were so already" if same else "")
        ]
        if new:
            lines += self._figures(new)
        if self.failed:
            lines.append(f"  left out     the samples of {_count(self.failed, 'clip')} that cannot be decoded")
        if self.off_grid:
            lines.append(
                f"  off beat     {_count(self.off_grid, 'sample')} with frames off k / {config.fps:g} s,"
                " which now show the picture of the last such moment; a higher transcode.fps keeps more"
            )
        return lines

    def _figures(self, new: list[tuple[str, ClipFigures]]) -> list[str]:
        def total(name: str) -> float:
            return sum(getattr(figures, name) for _, figures in new)

        key, worst = min(new, key=lambda entry: entry[1].psnr_db)
        mean = sum(figures.psnr_db for _, figures in new) / len(new)
        before, after = total("bytes_before"), total("bytes_after")
        cpu_before, cpu_after = total("cpu_before_s"), total("cpu_after_s")
        ratio = f", {cpu_before / cpu_after:.1f} times less" if cpu_after > 0 else ""
        return [
            f"  pictures     {total('pictures_before'):,} → {total('pictures'):,}",
            f"  size         {before / 1e6:,.1f} → {after / 1e6:,.1f} MB, {100 * after / before:.0f} %",
            f"  quality      PSNR mean {mean:.1f} dB, worst clip {worst.psnr_db:.1f} dB ({key}), "
            f"worst picture {min(figures.worst_psnr_db for _, figures in new):.1f} dB",
            f"  decode cost  {cpu_before:,.2f} → {cpu_after:,.2f} CPU-seconds for the pictures at "
            f"{self.config.fps:g} a second{ratio}",
        ]


class Transcoder:
    """Rewrites clips into `folder`, in which it finds those of an earlier run again."""

    def __init__(self, config: TranscodeConfig, out: Path, store: ShardStore, workers: int = 0):
        """`out`: the packed source to be. `workers`: processes; 0 works in this one, which a broken file may take."""
        self._config = config
        self._out = out
        self._store = store
        self._workers = workers
        # What a clip may cost changes nothing about it.
        what = {name: value for name, value in asdict(config).items() if name not in ("timeout_s", "max_pixels")}
        self._folder = out.with_name(f"{out.name}.transcoded-{_digest(json.dumps(what))[:12]}")
        self._reasons: dict[Piece, str] = {}
        self._rewritten: set[Piece] = set()
        self.summary = TranscodeSummary(config)

    def run(self, clips: Sequence[Clip], progress: bool = False) -> None:
        """Transcode the clips; what fails is kept for `read`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._folder.glob("*.partial"):  # of a run that was killed
            stale.unlink(missing_ok=True)
        bar = progress_bar(clips, "transcoding", progress)
        for (key, member, piece), outcome in self._outcomes(bar):
            if isinstance(outcome, SampleError):
                self.summary.failed += 1
                self._reasons[piece] = f"{member}: {outcome.reason}"
            else:
                self.summary.clips.append((key, outcome))
                if outcome.rewritten:
                    self._rewritten.add(piece)

    def read(self, key: str, piece: Piece) -> bytes:
        """The bytes that take the place of a piece; SampleError when its clip cannot be decoded."""
        if piece in self._reasons:
            raise SampleError(key, self._reasons[piece])
        return self._place(piece).read_bytes() if piece in self._rewritten else piece.read(self._store)

    def clean_up(self) -> None:
        """Remove the new clips, also those of runs with other settings: the packed source stands."""
        ours = re.compile(rf"{re.escape(self._out.name)}\.transcoded-[0-9a-f]{{12}}")
        for folder in self._out.parent.iterdir():
            if ours.fullmatch(folder.name):
                shutil.rmtree(folder)

    def _outcomes(self, clips: Iterator[Clip]) -> Iterator[tuple[Clip, ClipFigures | SampleError]]:
        """Each clip with its figures, or the reason why there are none, in order."""
        with ExitStack() as stack:
            submit = self._run_here
            if self._workers:
                pool = DecodePool(self._workers, self._config.timeout_s, PROCESS_MEMORY_MB, self._store)
                submit = stack.enter_context(closing(pool)).submit
            waiting: deque[tuple[Clip, Future[ClipFigures]]] = deque()
            for clip in clips:
                waiting.append((clip, self._known(clip) or submit(self._job(clip))))
                while len(waiting) > _CLIPS_AHEAD * self._workers:
                    clip, future = waiting.popleft()
                    yield clip, self._outcome(clip, future)
            for clip, future in waiting:
                yield clip, self._outcome(clip, future)

    def _outcome(self, clip: Clip, future: "Future[ClipFigures]") -> ClipFigures | SampleError:
        try:
            return future.result()
        except SampleError as error:
            # A process that died or took too long may fare better another time; what the decoder refused will not.
            if isinstance(error, DecodeFailure) or not self._workers:
                _write(_figures_file(self._place(clip[2])), json.dumps({"failed": error.reason}).encode())
            return error

    def _job(self, clip: Clip) -> TranscodeJob:
        key, _, piece = clip
        place = str(self._place(piece))
        return TranscodeJob(key, piece.location, piece.offset, piece.size, place, self._config, piece.file_size)

    def _run_here(self, job: TranscodeJob) -> "Future[ClipFigures]":
        future: Future[ClipFigures] = Future()
        try:
            future.set_result(run_job(job, self._store))
        except Exception as error:  # whatever it is belongs to whoever asks for the result
            future.set_exception(error)
        return future

    def _known(self, clip: Clip) -> "Future[ClipFigures] | None":
        """What an earlier run found, None when none did."""
        place = self._place(clip[2])
        try:
            entry = json.loads(_figures_file(place).read_bytes())
        except FileNotFoundError:
            return None
        future: Future[ClipFigures] = Future()
        if "failed" in entry:
            future.set_exception(SampleError(clip[0], entry["failed"]))
        else:
            future.set_result(ClipFigures(**entry))
        return future

    def _place(self, piece: Piece) -> Path:
        """Where the new clip lies; another one when the old file was changed."""
        where = self._store.cache.path(piece.location).name if is_remote(piece.location) else piece.location
        return self._folder / f"{_digest(json.dumps([where, piece.offset, piece.size, piece.mtime_ns]))[:32]}.mp4"


def shows_other_moments(sample: Sample, fps: float) -> bool:
    """Whether a stream sample shows frames at moments that are not among k / fps."""
    sampling = getattr(sample, "sampling", None)
    if not isinstance(sampling, StreamSampling):
        return False
    if sampling.times_s is not None:
        moments = sampling.times_s
    elif sampling.fps is not None:
        moments = [sampling.start_s, sampling.start_s + 1 / sampling.fps]
    else:
        moments = [sampling.start_s]
    return any(abs(moment * fps - round(moment * fps)) > 1e-6 for moment in moments)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _figures_file(place: Path) -> Path:
    return place.with_suffix(".json")


def _write(path: Path, data: bytes) -> None:
    """The file appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
