"""Public benchmarks from local annotation files and videos: StreamingBench's proactive output and OVO-Bench.

Both are read as their authors publish them, as far as it is known (docs/evaluation.md says what was not verified); flat
tables with the same names work too. What a row lacks is named with its number.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.errors import DataError
from moss_train.evaluate.file_corpus import FileItem
from moss_train.evaluate.metrics.benchmarks import OVO_TASKS, PROACTIVE_PATIENCE_S
from moss_train.streams.config import CompilerConfig

BENCHES = ("streamingbench_po", "ovo")
POLL_S = 1.0  #: StreamingBench asks the model every second
_LETTERS = "ABCDEFGH"
_TASKS = tuple(task for tasks in OVO_TASKS.values() for task in tasks)


@dataclass(frozen=True)
class ProactiveQuestion:
    """One question of StreamingBench's proactive output: say something as soon as something is seen."""

    key: str
    video: Path
    question: str
    asked_s: float
    answer: str
    answer_s: float  #: when the ground truth says it


@dataclass(frozen=True)
class Probe:
    """OVO-Bench: one question about what a video has shown up to one moment."""

    key: str
    video: Path
    task: str
    time_s: float
    prompt: str
    answer: str  #: an option's letter, a count, or "yes" / "no"


class _Row:
    """One row of annotations; says which row, and what it lacks. `part` numbers what one entry of a JSON file lists, 0
    where that is one thing."""

    def __init__(self, file: Path, number: int, part: int, values: Mapping[str, Any]):
        self._where, self.number, self.part, self.values = f"{file.name} row {number}", number, part, values

    def text(self, *names: str) -> str:
        """The first of the named fields that is there."""
        for name in names:
            value = self.values.get(name)
            if value is not None and str(value).strip():
                return str(value).strip()
        raise self.error(f"{' or '.join(names)} is missing")

    def whole(self, *names: str) -> int:
        text = self.text(*names)
        try:
            return int(float(text))
        except ValueError as error:
            raise self.error(f"{names[0]}={text!r} is no whole number") from error

    def seconds(self, *names: str) -> float:
        text = self.text(*names)
        try:
            return seconds_of(text)
        except ValueError as error:
            raise self.error(f"{names[0]}={text!r} is no time; give seconds or HH:MM:SS") from error

    def error(self, fault: str) -> DataError:
        return DataError(f"{self._where}: {fault}")


def seconds_of(text: str) -> float:
    """`75`, `75.5`, `01:15` or `00:01:15` as seconds; ValueError for anything else."""
    parts = [float(part) for part in text.split(":")]
    if len(parts) > 3 or not all(math.isfinite(part) and part >= 0 for part in parts):
        raise ValueError(text)
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def load_proactive(annotations: Path, media_root: Path) -> list[ProactiveQuestion]:
    """StreamingBench's proactive output: JSON, an entry a video with its `questions`, or a table, a row a question.

    DataError when the file is none of these or a row lacks something.
    """
    found = []
    for row in _rows(annotations, "questions"):
        asked_s = row.seconds("time_stamp")
        answer_s = row.seconds("ground_truth_time_stamp")
        if answer_s < asked_s:
            raise row.error(f"the ground truth's time {answer_s:g} s is before the question's {asked_s:g} s")
        name = str(row.values.get("question_id") or f"{row.number}-{row.part or 1}")
        found.append(
            ProactiveQuestion(
                key=f"streamingbench-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}",
                video=_video(media_root, _proactive_video(row)),
                question=row.text("question"),
                asked_s=asked_s,
                answer=row.text("ground_truth_output", "ground_truth", "answer"),
                answer_s=answer_s,
            )
        )
    return found


def _proactive_video(row: _Row) -> str:
    """The published tables name the video only within the question's id."""
    if not any(row.values.get(name) for name in ("video_path", "video")):
        named = re.search(r"sample_\d+", str(row.values.get("question_id", "")))
        if named:
            return named[0]
    return row.text("video_path", "video")


def load_probes(annotations: Path, media_root: Path) -> list[Probe]:
    """OVO-Bench: JSON entries, the forward tasks with a list `test_info` of moments, or a table of one row a moment.

    DataError when the file is none of these or a row lacks something.
    """
    found = []
    for row in _rows(annotations, "test_info"):
        task = row.text("task").upper()
        if task not in _TASKS:
            raise row.error(f"task={task!r}: legal values are {', '.join(_TASKS)}")
        prompt, answer = _PROMPTS.get(task, _choice)(row)
        name = f"ovo-{task.lower()}-{row.values.get('id', row.number)}" + (f"-{row.part}" if row.part else "")
        video = _video(media_root, row.text("video", "video_path"))
        found.append(Probe(name, video, task, row.seconds("realtime"), prompt, answer))
    return found


def _choice(row: _Row) -> tuple[str, str]:
    options = row.values.get("options")
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as error:
            raise row.error("options: a table needs them as a JSON list") from error
    if not isinstance(options, list) or not 2 <= len(options) <= len(_LETTERS):
        raise row.error(f"options must be a list of 2 to {len(_LETTERS)}")
    right = row.text("gt", "answer")
    if right in _LETTERS[: len(options)]:
        answer = right
    elif right.isdigit() and int(right) < len(options):
        answer = _LETTERS[int(right)]
    else:
        raise row.error(f"gt={right!r} is neither the number of an option, from 0, nor its letter")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return f"{row.text('question')}\n{listed}\nAnswer with the letter of the right option only.", answer


def _count(row: _Row) -> tuple[str, str]:
    asked = row.values.get("question") or f"How many times did they {row.text('activity')} so far?"
    return f"{asked}\nAnswer with a number only.", str(row.whole("count"))


def _step(row: _Row) -> tuple[str, str]:
    asked = f"Is this step being carried out now: {row.text('step')}?"
    if row.values.get("tutorial"):
        asked = f"The video is about: {row.text('tutorial')}. {asked}"
    return f"{asked}\nAnswer yes or no only.", _yes_no(row)


def _clue(row: _Row) -> tuple[str, str]:
    asked = f"Has the video shown enough so far to answer this question: {row.text('question')}"
    return f"{asked}\nAnswer yes or no only.", _yes_no(row)


def _yes_no(row: _Row) -> str:
    kind = row.whole("type")
    if kind not in (0, 1):
        raise row.error(f"type={kind}: must be 0 (no) or 1 (yes)")
    return "yes" if kind else "no"


_PROMPTS: dict[str, Callable[[_Row], tuple[str, str]]] = {"REC": _count, "SSR": _step, "CRR": _clue}


def proactive_items(
    questions: Sequence[ProactiveQuestion], compiler: CompilerConfig, system: str | None
) -> list[FileItem]:
    """A stream for each question, from its video's beginning to the last poll, 4 s after the ground truth's time.

    With more frames than `compiler.max_frames` it begins as late as these reach, and the question is asked then if it
    would be before.
    """

    def build(question: ProactiveQuestion, duration_s: float) -> dict[str, Any]:
        last_s = min(question.answer_s + PROACTIVE_PATIENCE_S, duration_s)
        end_s = min(last_s + 1 / compiler.fps, duration_s)  # so that a frame arrives at the last poll
        first = max(0, math.ceil(end_s * compiler.fps - 1e-6) - compiler.max_frames)
        start_s = first / compiler.fps
        asked_s = max(question.asked_s, start_s)
        answer_s = max(question.answer_s, asked_s)
        return {
            "schema": "moss_train/stream@1",
            "sampling": {"fps": compiler.fps, "start_s": start_s, "end_s": end_s},
            "system": system,
            "events": [
                {"id": "q", "t": asked_s, "role": "user", "text": question.question},
                {
                    "id": "a", "t": answer_s, "role": "assistant", "kind": "speak", "text": question.answer,
                    "reply_to": "q", "evidence": [answer_s, answer_s],
                },
            ],
            "source_metadata": {
                "questions": [
                    {
                        "id": "q", "asked_t": asked_s, "evidence_t": answer_s, "answer_id": "a",
                        "answer": question.answer,
                    }
                ],
                "revisions": [],
            },
        }  # fmt: skip

    return [FileItem(one.key, one.video, lambda duration_s, one=one: build(one, duration_s)) for one in questions]


def probe_items(probes: Sequence[Probe], system: str | None) -> list[FileItem]:
    """A conversation for each probe: the video up to its moment, then the question."""

    def build(probe: Probe) -> dict[str, Any]:
        return {
            "schema": "moss_train/conversation@1",
            "sampling": {"end_s": probe.time_s},
            "system": system,
            "messages": [
                {"role": "user", "content": f"<|video|>{_plain(probe.prompt)}"},
                {"role": "assistant", "content": probe.answer},
            ],
            "source_metadata": {"question_types": [probe.task]},
        }

    return [FileItem(probe.key, probe.video, lambda _, probe=probe: build(probe)) for probe in probes]


def _plain(text: str) -> str:
    """Without what would be read as a medium."""
    return text.replace("<|video|>", "<video>").replace("<|image|>", "<image>")


def _rows(file: Path, listed: str) -> Iterator[_Row]:
    """The rows of a file; of an entry that lists several things under `listed`, one each, with what holds for all."""
    for number, entry in enumerate(_read(file), 1):
        parts = entry.get(listed)
        if not isinstance(parts, list):
            yield _Row(file, number, 0, entry)
            continue
        for part, values in enumerate(parts, 1):
            yield _Row(file, number, part if len(parts) > 1 else 0, entry | values)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv, .jsonl or .json file (a list, or an object whose only list it is)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    try:
        if file.suffix == ".csv":
            rows: Any = list(csv.DictReader(text.splitlines(keepends=True)))
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error}); give .json, .jsonl or .csv") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: holds no list of annotations")
    yield from rows


def _video(media_root: Path, name: str) -> Path:
    """The file that a row names: below `media_root` as it is written, by its name alone, with .mp4 behind it, or a
    folder's `video.mp4`. Where there is none, as written: the sample is then left out and told of."""
    written = Path(name)
    for path in (written, Path(written.name)):
        for tried in (path, path.with_name(path.name + ".mp4"), path / "video.mp4"):
            if (media_root / tried).is_file():
                return media_root / tried
    return media_root / written
