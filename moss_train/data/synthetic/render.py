"""`data render`: the built-in default data. Clips of the procedural world as real H.264 files with their samples.

Writes staging folders `<out>/<split>/<source>/{key}.json` with `{key}.mp4`, `{key}.jpg` or `{key}.png` beside them, one
source for each training stage, in a training and a held-out split. Beside a source with clips stand their captions,
`<out>/<split>/<source>.captions.json`: what each clip shows from when to when, in the form of ActivityNet Captions. A
sample is a function of (seed, key) alone, whatever the number of workers.
"""

import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from moss_train.data.shards.staging import check_target, staged_folder
from moss_train.data.synthetic.scenes import NATIVE_FPS, Clip
from moss_train.data.synthetic.world import sample_clip
from moss_train.errors import ConfigError

#: what the training stages learn from: source → [(share, kind of sample)]
SOURCES: dict[str, list[tuple[float, str]]] = {
    "align": [(1.0, "still_caption")],
    "temporal": [(1.0, "clip_caption")],
    "sft": [(0.9, "conversation"), (0.1, "text")],
    "realtime": [(1.0, "stream")],
}
#: held-out samples of a source other than `realtime`, as a share of the held-out streams
HELDOUT_OFFLINE_SHARE = 0.5
MARKER_NAME = "render.json"
#: what follows a source's name in that of the file with the captions of its clips
CAPTIONS_SUFFIX = ".captions.json"
_KEYS_PER_TASK = 32


@dataclass
class RenderOptions:
    """Options of `data render`."""

    out: str
    """Folder to make: `train/` and `heldout/`, each with a staging folder a source."""
    align: int = 6000
    """Captioned stills of the training split."""
    temporal: int = 800
    """Captioned clips of 12 to 16 s."""
    sft: int = 2500
    """Conversations about clips of 12 s; a tenth of them about nothing seen."""
    realtime: int = 4500
    """Streams of 12 s."""
    heldout: int = 320
    """Held-out streams; every other source gets half as many held-out samples."""
    seed: int = 0
    """Another seed gives other clips."""
    workers: int = 2
    """Processes that render and encode; has no influence on the result."""
    overwrite: bool = False
    """Replace `out` when an earlier `data render` made it by other code or with other options."""

    def validate(self) -> None:
        for name in ("align", "temporal", "sft", "realtime", "heldout", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be at least 1")
        if not any(self.counts().values()):
            raise ConfigError("nothing to render: raise one of align, temporal, sft, realtime, heldout above 0")

    def counts(self) -> dict[tuple[str, str], int]:
        """(split, source) → samples, without the empty ones."""
        counts = {("train", source): getattr(self, source) for source in SOURCES}
        for source in SOURCES:
            share = 1.0 if source == "realtime" else HELDOUT_OFFLINE_SHARE
            counts["heldout", source] = round(self.heldout * share)
        return {name: count for name, count in counts.items() if count}


def render_command(options: RenderOptions) -> int:
    """Render the built-in synthetic clips with their captions, conversations and streams. What `out` holds already is
    left as it is when the same code made it from the same options."""
    if up_to_date(options):
        print(f"{options.out}: up to date")
        return 0
    started = time.monotonic()
    counts = render(options, progress=True)
    for (split, source), count in counts.items():
        print(f"{options.out}/{split}/{source}: {count} samples")
    print(f"rendered {sum(counts.values())} samples in {time.monotonic() - started:.1f} s")
    return 0


def render(options: RenderOptions, progress: bool = False) -> dict[tuple[str, str], int]:
    """Write the folders; returns (split, source) → samples. `out` appears complete or not at all; one that is up to
    date stays.

    Raises DataError when `out` holds anything else and may not be replaced.
    """
    options.validate()
    out = Path(options.out)
    if up_to_date(options):
        return options.counts()
    check_target(out, MARKER_NAME, "data render", options.overwrite, "was made by other code or with other options")
    counts = options.counts()
    with staged_folder(out) as partial:
        tasks, folders = [], []
        for (split, source), count in counts.items():
            folder = partial / split / source
            folder.mkdir(parents=True)
            folders.append(folder)
            for first in range(0, count, _KEYS_PER_TASK):
                numbers = range(first, min(first + _KEYS_PER_TASK, count))
                tasks.append((folder, split, source, numbers, options.seed))
        captions: dict[Path, dict[str, dict]] = {folder: {} for folder in folders}
        with Progress(disable=not progress) as bar:
            shown = bar.add_task("rendering", total=sum(counts.values()))

            def written(task: tuple, of_clips: dict[str, dict]) -> None:
                captions[task[0]] |= of_clips
                bar.advance(shown, len(task[3]))

            if options.workers == 1:
                for task in tasks:
                    written(task, _write_samples(*task))
            else:
                # spawned, not forked: the caller may hold threads
                with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
                    running = {pool.submit(_write_samples, *task): task for task in tasks}
                    try:
                        for done in as_completed(running):
                            written(running[done], done.result())
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
        for folder, of_clips in captions.items():
            if of_clips:
                text = json.dumps(dict(sorted(of_clips.items())), indent=0)
                folder.with_name(folder.name + CAPTIONS_SUFFIX).write_text(text + "\n", encoding="utf-8")
        (partial / MARKER_NAME).write_text(_marker(options), encoding="utf-8")
    return counts


def up_to_date(options: RenderOptions) -> bool:
    """Whether `out` holds what these options and this code would write."""
    marker = Path(options.out) / MARKER_NAME
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == _marker(options)


def _marker(options: RenderOptions) -> str:
    """What tells one rendering from another: the options that shape it and the code that made it."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("out", "workers", "overwrite")}
    code = hashlib.sha256()
    for name in ("world.py", "scenes.py", "render.py"):
        code.update(Path(__file__).with_name(name).read_bytes())
    return json.dumps(settings | {"code": code.hexdigest()}, indent=1) + "\n"


def render_sample(seed: int, split: str, source: str, number: int) -> Clip:
    """The sample with key `<source>-<split>-<number>` of a seed."""
    key = f"{source}-{split}-{number:06d}"
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint64))
    shares, kinds = zip(*SOURCES[source], strict=True)
    kind = str(rng.choice(kinds, p=shares))
    return sample_clip(rng, split, kind, key)


def _write_samples(folder: Path, split: str, source: str, numbers: range, seed: int) -> dict[str, dict]:
    """Writes samples with their media; returns the captions of the clips among them, by key."""
    captions = {}
    for number in numbers:
        clip = render_sample(seed, split, source, number)
        for medium in clip.sample["media"]:
            path = folder / f"{clip.key}.{medium['member']}"
            if medium["kind"] == "video":
                assert clip.timeline is not None
                captions[clip.key] = clip.timeline.captions()
                write_video(path, clip.frames(NATIVE_FPS), NATIVE_FPS)
            else:
                write_still(path, clip.frames(1.0)[0])
        (folder / f"{clip.key}.json").write_text(json.dumps(clip.sample, ensure_ascii=False), encoding="utf-8")
    return captions


def write_video(path: Path, frames_FHWC: np.ndarray, fps: float) -> None:
    """An mp4 file (H.264, 4:2:0, one key frame a second, index at the front, no sound) of uint8 RGB frames.

    The same frames give the same bytes. Height and width must be even.
    """
    import av

    height, width = frames_FHWC.shape[1:3]
    # bitexact keeps the encoder's version and the time of day out of the file
    with av.open(path, "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = max(1, round(fps))
        stream.options = {"qp": "18", "preset": "superfast"}
        stream.codec_context.thread_count = 1
        for frame_HWC in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def write_still(path: Path, image_HWC: np.ndarray) -> None:
    """A picture of uint8 RGB in the format of the path's extension."""
    options = {} if path.suffix == ".png" else {"quality": 92, "subsampling": "4:2:0"}
    Image.fromarray(image_HWC).save(path, **options)
