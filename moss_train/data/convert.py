"""`data convert`: annotation files and a folder of media become a staging folder that `data pack` reads.

Media are found by base name below `media_root`, since annotations carry the paths of another machine; where they name
a video without its extension, by that (mp4 before the others). A row that cannot be converted is written to
`quarantine.jsonl` with its key and the reason; the others go on.
"""

import filecmp
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moss_train.data.shards.staging import check_target, staged_folder
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.importers.common import ImportContext, Imported
from moss_train.streams.importers.formats import FORMATS, Format
from moss_train.streams.media import VIDEO_EXTENSIONS
from moss_train.streams.schema import dump_sample, parse_sample

QUARANTINE_NAME = "quarantine.jsonl"
MARKER_NAME = "convert.jsonl"
_MEDIA_SUFFIXES = frozenset({".mp4", ".avi", ".webm", ".mkv", ".mov", ".jpg", ".jpeg", ".png", ".webp"})


@dataclass
class ConvertOptions:
    """Options of `data convert`."""

    annotations: str
    """A file, or a folder whose `*.json` and `*.jsonl` files are read in the order of their names."""
    media_root: str
    """Folder below which the media lie; found by base name."""
    out: str
    """Staging folder to make."""
    source: str = "moss"
    """Form of the annotations. `examples`: one sample of our own schema a file, its media named in
    `source_metadata.files`. `moss`: the reference's sharegpt rows. `conversations`: LLaVA and message lists.
    `llava_video`, `activitynet`, `coin`, `ego4d`, `videollm_online`, `text_stream` (LiveCC, Inf-Streams) and `streamo`:
    the files as published, see data_specs/README.md."""
    fps: float = 1.0
    """Frames a second of the streams that are made of timed annotations; replies start at these frames."""
    copy: bool = True
    """Copy the media; False makes hard links where the file system allows it."""
    overwrite: bool = False
    """Replace `out` when an earlier `data convert` made it."""

    def validate(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"source={self.source!r} is unknown; use one of {', '.join(SOURCES)}")
        if not 0 < self.fps <= 1000:
            raise ConfigError(f"fps={self.fps} must lie above 0 and be at most 1000")


@dataclass(frozen=True)
class ConvertSummary:
    """What became of the rows."""

    written: Counter  #: kind of sample → count
    quarantined: tuple[SampleError, ...]


def convert_command(options: ConvertOptions) -> int:
    """Convert annotations and their media to a staging folder."""
    summary = convert(options)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.written.items()))
    print(f"{options.out}: {sum(summary.written.values())} samples written ({kinds})")
    for error in summary.quarantined[:10]:
        print(f"left out {error.key}: {error.reason}")
    if len(summary.quarantined) > 10:
        print(f"… and {len(summary.quarantined) - 10} more")
    if summary.quarantined:
        print(f"{len(summary.quarantined)} rows left out, listed in {options.out}/{QUARANTINE_NAME}")
    return 0


def convert(options: ConvertOptions) -> ConvertSummary:
    """Write the staging folder. `out` appears complete or not at all.

    Raises DataError when there is nothing to read, nothing could be written, or `out` may not be replaced.
    """
    options.validate()
    out = Path(options.out)
    check_target(out, MARKER_NAME, "data convert", options.overwrite)
    files = annotation_files(Path(options.annotations))
    media = media_by_name(Path(options.media_root))
    context = ImportContext(options.fps, videos_by_stem(media))
    written: Counter = Counter()
    quarantined: list[SampleError] = []
    with staged_folder(out) as partial:
        keys: set[str] = set()
        if options.source == "examples":
            rows = _examples(files)
        else:
            rows = annotation_rows(files, options.source, FORMATS[options.source], context)
        for key, row in rows:
            try:
                if isinstance(row, SampleError):
                    raise row
                if key in keys:
                    raise SampleError(key, "the key is used twice; rename one of the annotation files")
                keys.add(key)
                sample, members = row()
                found = {member: resolve_medium(key, path, media) for member, path in members.items()}
                for member, path in found.items():
                    place_medium(path, partial / f"{key}.{member}", options.copy)
                (partial / f"{key}.json").write_text(dump_sample(sample) + "\n", encoding="utf-8")
                written[sample.schema_name.partition("/")[2].partition("@")[0]] += 1
            except SampleError as error:
                quarantined.append(error)
        if not written:
            first = f"; the first: {quarantined[0]}" if quarantined else ""
            raise DataError(f"{options.annotations} gave no sample ({len(quarantined)} rows left out{first})")
        write_lines(partial / MARKER_NAME, [{"annotations": path.name, "source": options.source} for path in files])
        if quarantined:
            entries = [{"key": e.key, "reason": e.reason, "exception": type(e).__name__} for e in quarantined]
            write_lines(partial / QUARANTINE_NAME, entries)
    return ConvertSummary(written, tuple(quarantined))


def annotation_files(path: Path) -> list[Path]:
    """The file, or the annotation files of a folder in the order of their names; DataError when there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"annotations={path} does not exist")
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if not files:
        raise DataError(f"annotations={path} holds no .json or .jsonl file")
    return files


def media_by_name(root: Path) -> dict[str, list[Path]]:
    """Base name → the media files of that name below `root`."""
    if not root.is_dir():
        raise DataError(f"media_root={root} is not a folder")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _MEDIA_SUFFIXES and path.is_file():
            found.setdefault(path.name, []).append(path)
    return found


def videos_by_stem(media: dict[str, list[Path]]) -> dict[str, str]:
    """Base name without extension → base name, of the videos; the first extension in the order of preference."""
    videos: dict[str, str] = {}
    for extension in VIDEO_EXTENSIONS:
        for name in media:
            if name.lower().endswith(f".{extension}"):
                videos.setdefault(name.rpartition(".")[0], name)
    return videos


def resolve_medium(key: str, listed: str, media: dict[str, list[Path]]) -> Path:
    """The one file with the base name of `listed`; equal copies count as one."""
    name = PureWindowsPath(listed).name if "\\" in listed else PurePosixPath(listed).name
    paths = media.get(name, [])
    if not paths:
        raise SampleError(key, f"medium {name!r} is not below media_root")
    for other in paths[1:]:
        if not filecmp.cmp(paths[0], other, shallow=False):
            raise SampleError(key, f"medium {name!r} stands for different files: {paths[0]} and {other}")
    return paths[0]


def place_medium(path: Path, target: Path, copy: bool) -> None:
    """A copy of `path` at `target`, or a hard link where that is allowed and `copy` is not asked for."""
    if not copy:
        try:
            os.link(path, target)
            return
        except OSError:
            pass  # another file system, or links are not allowed: copy
    shutil.copyfile(path, target)


#: a key with either the reading of its row, which may raise SampleError, or why there is no row
Row = tuple[str, Callable[[], Imported] | SampleError]


def annotation_rows(files: list[Path], source: str, form: Format, context: ImportContext) -> Iterator[Row]:
    """The rows of all files of one form, with keys `<file>-000000` onwards; `source` names the form in messages."""
    for file in files:
        stem = file.stem.replace(".", "_")
        count = 0
        try:
            for loaded in _documents(file):
                for row in form.rows(loaded):
                    key = f"{stem}-{count:06d}"
                    count += 1
                    yield key, (lambda row=row, key=key: form.read(row, key, context))
        except SampleError as error:  # the file as a whole has another form
            yield stem, SampleError(stem, f"{file.name}: {error.reason}; is it of source={source}?")
        except (ValueError, RecursionError) as error:
            read = f" after {count} rows" if count else ""
            yield stem, SampleError(stem, f"{file.name} is not JSON{read}: {error}")


def _documents(file: Path) -> Iterator[Any]:
    """The value of a JSON file; of JSON lines, which may be many, one list of one value a line."""
    if file.suffix != ".jsonl":
        yield json.loads(file.read_text(encoding="utf-8"))
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield [json.loads(line)]


def _example(file: Path) -> Imported:
    """One sample of our own schema; `source_metadata.files` says which file each tar member is."""
    key = file.stem.replace(".", "_")
    sample = parse_sample(file.read_bytes(), key)
    files = (sample.source_metadata or {}).get("files", {})
    missing = [medium.member for medium in sample.media if not isinstance(files.get(medium.member), str)]
    if missing:
        raise SampleError(key, f"source_metadata.files: names no file for member {missing[0]!r}; add its base name")
    return sample, {medium.member: files[medium.member] for medium in sample.media}


def _examples(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield file.stem.replace(".", "_"), (lambda file=file: _example(file))


def write_lines(path: Path, entries: list[dict]) -> None:
    """A file of JSON lines."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(lines, encoding="utf-8")


SOURCES = ("examples", *FORMATS)
