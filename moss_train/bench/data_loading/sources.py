"""What is loaded: the cases of the comparison, each a set of packed sources, and which pictures they ask for.

`realtime` stands for the blend of real-time training (`data_specs/blends/moss_realtime.yaml`: 11% text, 29% image, 60%
video). How long its videos are is not published; here half of them are clips of 6 to 20 s with a question, half are
streams whose length is log-normal (median 30 s, σ 0.7, cut at 6 and 256 s), at one frame a second.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moss_train.bench.data_loading.clips import ClipSpec, encode_clip, repeated, still_picture
from moss_train.data.decoding.probe import probe_media
from moss_train.data.shards.pack import pack
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample
from moss_train.streams.tokenizer import load_tokenizer

#: raised when the same sizes begin to give other sources
VERSION = 2
SHARES = {"text": 0.11, "image": 0.29, "video": 0.60}
MEDIAN_S, SIGMA, LEAST_S, MOST_S = 30.0, 0.7, 6.0, 256.0
_WORDS = (
    "a red ball rolls past the open door while someone looks on and then turns it over to see what lies below".split()
)


@dataclass(frozen=True)
class Staged:
    """A sample before it is packed."""

    key: str
    sample: dict
    members: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """The pictures that a sample shows."""

    member: str = ""  #: "" when it has no media
    times: tuple[float, ...] = ()  #: seconds, ascending
    width: int = 0  #: of the medium
    height: int = 0


@dataclass(frozen=True)
class CaseSources:
    """What a case loads, and which pictures it must get."""

    name: str
    folders: dict[str, Path]  #: source → packed folder, for our loader
    tars: list[Path]  #: the same shards, for the others
    requests: dict[str, Asked]  #: by key
    batch: int  #: streams of a global batch; divides their number
    ranks: int = 1  #: tensor-parallel ranks that each need the batch
    originals: "CaseSources | None" = None  #: of transcoded clips: what the others read

    @property
    def frames(self) -> int:
        return sum(len(asked.times) for asked in self.requests.values())


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `quick` is for tests, where no ratio means anything."""

    sparse: tuple[float, int, int] = (150.0, 4, 64)  #: seconds of a clip, how often it is repeated, pictures asked for
    short: tuple[int, float] = (6, 8.0)  #: clips, seconds
    dense: tuple[int, float, float] = (2, 10.0, 8.0)  #: clips, seconds, pictures a second
    transcoded: tuple[int, float] = (2, 12.0)  #: clips, seconds
    streams: tuple[float, ...] = (12.0, 20.0, 28.0, 40.0, 64.0)  #: seconds of the streams of `realtime`
    offline: tuple[float, ...] = (6.0, 8.0, 10.0, 13.0, 17.0)
    images: int = 5
    texts: int = 1
    low: tuple[int, int] = (640, 360)
    middle: tuple[int, int] = (854, 480)
    high: tuple[int, int] = (1280, 720)
    preset: str = "medium"


QUICK = Sizes(
    sparse=(12.0, 2, 3),
    short=(1, 2.0),
    dense=(1, 2.0, 4.0),
    transcoded=(1, 4.0),
    streams=(4.0,),
    offline=(2.0,),
    images=1,
    texts=1,
    low=(160, 90),
    middle=(160, 90),
    high=(160, 90),
    preset="veryfast",
)


#: cases of the comparison, in the order in which they are run
CASES = ("sparse", "short", "dense", "sharded", "realtime", "transcoded")


def make_cases(
    folder: Path, sizes: Sizes, names: Sequence[str], transcode: Callable[[Path, Path], None], say: Callable
) -> list[CaseSources]:
    """The named cases: encoded, packed and, the last one, transcoded below `folder`, where they are not there yet."""
    stamp, wanted = folder / "made.json", json.dumps([VERSION, str(sizes)])
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(folder / "sources", ignore_errors=True)
        shutil.rmtree(folder / "energon", ignore_errors=True)
    clips = _Clips(folder / "clips", sizes, say)
    makers = {
        "sparse": lambda: _case(folder, "sparse", {"sparse": _sparse(clips, sizes)}, 1),
        "short": lambda: _case(folder, "short", {"short": _short(clips, sizes)}, 2 - sizes.short[0] % 2),
        "dense": lambda: _case(folder, "dense", {"dense": _dense(clips, sizes)}, 1),
        "sharded": lambda: _case(folder, "sharded", {"streams": _streams(clips)}, len(sizes.streams), ranks=2),
        "realtime": lambda: _realtime(folder, clips, sizes),
        "transcoded": lambda: _transcoded(folder, clips, sizes, transcode, say),
    }
    cases = [makers[name]() for name in CASES if name in names]
    stamp.write_text(wanted)
    return cases


def startup_case(folder: Path) -> CaseSources:
    """One small still: what a loader costs before it does anything."""
    small = Staged("start0", _caption("start0", "image", "jpg"), {"jpg": still_picture(0, 32, 32)})
    return _case(folder, "startup", {"startup": [small]}, 1)


class _Clips:
    """Encoded clips, kept in files."""

    def __init__(self, folder: Path, sizes: Sizes, say: Callable):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        low, middle, high = sizes.low, sizes.middle, sizes.high
        self.sparse = ClipSpec(sizes.sparse[0], *low, 1, preset=sizes.preset)
        self.short = [ClipSpec(sizes.short[1], *middle, 10 + n, preset=sizes.preset) for n in range(sizes.short[0])]
        self.dense = [ClipSpec(sizes.dense[1], *middle, 30 + n, preset=sizes.preset) for n in range(sizes.dense[0])]
        self.high = [
            ClipSpec(sizes.transcoded[1], *high, 50 + n, preset=sizes.preset) for n in range(sizes.transcoded[0])
        ]
        self.streams = [ClipSpec(s, *low, 70 + n, preset=sizes.preset) for n, s in enumerate(sizes.streams)]
        self.offline = [ClipSpec(s, *low, 90 + n, preset=sizes.preset) for n, s in enumerate(sizes.offline)]
        specs = [self.sparse, *self.short, *self.dense, *self.high, *self.streams, *self.offline]
        missing = sorted((spec for spec in specs if not self._path(spec).exists()), key=lambda spec: -spec.frames)
        if missing:
            say(f"encoding {len(missing)} clips, {sum(spec.seconds for spec in missing):.0f} s of video")
            with ProcessPoolExecutor(2) as pool:
                for spec, data in zip(missing, pool.map(encode_clip, missing), strict=True):
                    self._path(spec).write_bytes(data)

    def _path(self, spec: ClipSpec) -> Path:
        return self._folder / f"{spec.name}.mp4"

    def read(self, spec: ClipSpec) -> bytes:
        return self._path(spec).read_bytes()


def _caption(key: str, kind: str, member: str, **sampling: float) -> dict:
    media = [{"id": "m0", "kind": kind, "member": member}]
    sample = {"schema": "moss_train/caption@1", "id": key, "media": media, "text": "What happens here is this."}
    return sample | ({"sampling": sampling} if sampling else {})


def _video(clips: _Clips, key: str, spec: ClipSpec, **sampling: float) -> Staged:
    return Staged(key, _caption(key, "video", "mp4", **sampling), {"mp4": clips.read(spec)})


def _sparse(clips: _Clips, sizes: Sizes) -> list[Staged]:
    _, times, frames = sizes.sparse
    sample = _caption("sparse0", "video", "mp4", fps=1.0, max_frames=frames)
    return [Staged("sparse0", sample, {"mp4": repeated(clips.read(clips.sparse), times)})]


def _short(clips: _Clips, sizes: Sizes) -> list[Staged]:
    return [_video(clips, f"short{n}", spec, fps=1.0) for n, spec in enumerate(clips.short)]


def _dense(clips: _Clips, sizes: Sizes) -> list[Staged]:
    return [_video(clips, f"dense{n}", spec, fps=sizes.dense[2]) for n, spec in enumerate(clips.dense)]


def _transcoded(folder: Path, clips: _Clips, sizes: Sizes, transcode: Callable, say: Callable) -> CaseSources:
    high = [_video(clips, f"high{n}", spec, fps=2.0) for n, spec in enumerate(clips.high)]
    originals = _case(folder, "originals", {"originals": high}, 1)
    packed = folder / "sources" / "transcoded"
    if not packed.exists():
        say("transcoding")
        transcode(originals.folders["originals"], packed)
    return CaseSources("transcoded", {"transcoded": packed}, originals.tars, originals.requests, 1, 1, originals)


def _realtime(folder: Path, clips: _Clips, sizes: Sizes) -> CaseSources:
    blend = {
        "text": [text_sample(f"text{n}", 200 + 40 * n) for n in range(sizes.texts)],
        "image": [_image(n) for n in range(sizes.images)],
        "offline": _offline(clips),
        "streams": _streams(clips),
    }
    total = sum(map(len, blend.values()))
    return _case(folder, "realtime", blend, total // 2 if total % 2 == 0 else total, ranks=2)


def _offline(clips: _Clips) -> list[Staged]:
    return [_video(clips, f"offline{n}", spec, fps=1.0) for n, spec in enumerate(clips.offline)]


def _streams(clips: _Clips) -> list[Staged]:
    return [
        Staged(f"stream{n}", stream_sample(f"stream{n}", spec.seconds, n), {"mp4": clips.read(spec)})
        for n, spec in enumerate(clips.streams)
    ]


def _image(number: int) -> Staged:
    key = f"image{number}"
    return Staged(key, image_sample(key, 60), {"jpg": still_picture(number, 1024, 768)})


def words(count: int, seed: int) -> str:
    """Some text of `count` words."""
    rng = np.random.default_rng(seed)
    return " ".join(_WORDS[place] for place in rng.integers(0, len(_WORDS), count))


def text_sample(key: str, count: int) -> Staged:
    """A dialogue without media, of about `count` words."""
    messages = [
        {"role": "user", "content": words(max(1, count // 4), count)},
        {"role": "assistant", "content": words(max(1, count - count // 4), count + 1)},
    ]
    return Staged(key, {"schema": "moss_train/conversation@1", "id": key, "media": [], "messages": messages})


def image_sample(key: str, count: int) -> dict:
    """A question about one picture and an answer of `count` words."""
    messages = [
        {"role": "user", "content": "<|image|>" + words(12, count)},
        {"role": "assistant", "content": words(count, count + 1)},
    ]
    media = [{"id": "m0", "kind": "image", "member": "jpg"}]
    return {"schema": "moss_train/conversation@1", "id": key, "media": media, "messages": messages}


def stream_sample(key: str, seconds: float, seed: int, fps: float = 1.0) -> dict:
    """A stream with a question every 15 s or so, answered after some seconds, and one revision."""
    rng = np.random.default_rng(seed)
    events: list[dict] = []
    time, number = 0.0, 0
    while time < seconds - 4:
        events.append({"id": f"q{number}", "t": round(time, 2), "role": "user", "text": words(9, seed + number)})
        said = round(time + float(rng.uniform(1, 3)), 2)
        text = words(int(rng.integers(6, 40)), seed + number + 1)
        reply = {"id": f"a{number}", "t": said, "role": "assistant", "kind": "speak", "text": text}
        events.append(reply | {"reply_to": f"q{number}"})
        time, number = said + float(rng.uniform(5, 25)), number + 1
    return {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": [{"id": "m0", "kind": "video", "member": "mp4"}],
        "sampling": {"fps": fps, "start_s": 0.0, "end_s": seconds},
        "system": "Watch, and say what changes.",
        "events": events,
    }


def stream_seconds(count: int, seed: int) -> np.ndarray:
    """float64 [count]: lengths of streams, see above."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(MEDIAN_S), SIGMA, count), LEAST_S, MOST_S)


def stage(folder: Path, samples: Sequence[Staged]) -> None:
    """Write samples to a staging folder."""
    folder.mkdir(parents=True)
    for staged in samples:
        (folder / f"{staged.key}.json").write_text(json.dumps(staged.sample), encoding="utf-8")
        for member, data in staged.members.items():
            (folder / f"{staged.key}.{member}").write_bytes(data)


def _case(folder: Path, name: str, sources: dict[str, list[Staged]], batch: int, ranks: int = 1) -> CaseSources:
    folders = {source: folder / "sources" / source for source in sources}
    for source, samples in sources.items():
        if not folders[source].exists():
            staging = folder / f"staging-{source}"
            shutil.rmtree(staging, ignore_errors=True)
            stage(staging, samples)
            pack(staging, folders[source])
            shutil.rmtree(staging)
    tars = [tar for path in folders.values() for tar in sorted(path.glob("*.tar"))]
    requests = {staged.key: requests_of(staged) for samples in sources.values() for staged in samples}
    return CaseSources(name, folders, tars, requests, batch, ranks)


def requests_of(staged: Staged) -> Asked:
    """What a sample asks of its medium, by the same compiler as in training."""
    sample = parse_sample(json.dumps(staged.sample).encode(), staged.key)
    infos, facts = {}, None
    for medium in sample.media:
        facts = probe_media(staged.members[medium.member], staged.key)
        count = None if facts.container == "image" else facts.frame_count
        infos[medium.id] = MediaInfo(facts.duration_s, facts.frame_rate, count)
    compiled = compile_sample(sample, infos, load_tokenizer(TokenizerConfig()), CompilerConfig())
    if facts is None:
        return Asked()
    times = tuple(float(request.time_s) for request in compiled.frames)
    return Asked(sample.media[0].member, times, facts.width, facts.height)
