"""The record of consumed samples (`<stage>/samples.jsonl`) of two runs."""

from collections import Counter
from dataclasses import dataclass, field

from moss_train.bench.recovering.folder import RunFolder
from moss_train.report.samples_file import FILE_NAME, ConsumedStep, read_samples

_SHOWN = 4  #: steps whose samples differ


@dataclass
class SampleFigures:
    """What the killed run consumed against the whole one."""

    consumed: int = 0  #: samples, counted as often as they came, of the whole run
    lost: int = 0  #: that the killed run did not consume, or not as often
    repeated: int = 0  #: that it consumed more often
    differences: list[str] = field(default_factory=list)


def compare_samples(whole: RunFolder, killed: RunFolder) -> SampleFigures:
    """Stage by stage: what is lost and repeated, and whether each step's samples are the same, in the same order."""
    found = SampleFigures()
    for stage in whole.stages:
        theirs, ours = (_record(folder, stage) for folder in (whole, killed))
        expected, consumed = (Counter(key for step in record for key in step.keys) for record in (theirs, ours))
        found.consumed += expected.total()
        found.lost += (expected - consumed).total()
        found.repeated += (consumed - expected).total()
        if theirs != ours:
            differing = {step.step for step in theirs if step not in ours} | {
                step.step for step in ours if step not in theirs
            }
            first = ", ".join(map(str, sorted(differing)[:_SHOWN]))
            found.differences.append(f"{stage}: {len(differing)} steps consumed other samples, the first are {first}")
    if not found.consumed:
        found.differences.append("no sample was recorded")
    return found


def _record(folder: RunFolder, stage: str) -> list[ConsumedStep]:
    path = folder.output / stage / FILE_NAME
    return read_samples(path) if path.is_file() else []
