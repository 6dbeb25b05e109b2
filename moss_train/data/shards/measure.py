"""How long streams become: samples compiled for their lengths alone, in a process of their own."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from moss_train.data.corpus import compile_entry
from moss_train.data.decoding.describe import read_tokenizer
from moss_train.data.decoding.job import read_member
from moss_train.data.order import variation_seed
from moss_train.data.shards.index import SourceIndex, open_index
from moss_train.errors import SampleError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.split import RowBudget


@dataclass(frozen=True)
class Measured:
    """Lengths of the units of some samples, and why others have none."""

    units: list[tuple[int, ...]]  #: number, part, text tokens, frames, then tokens and frames of each variant
    faults: dict[int, str]  #: number → reason

    def to_json(self) -> dict[str, Any]:
        return {"units": self.units, "faults": list(self.faults.items())}


@dataclass(frozen=True)
class MeasureJob:
    """Samples `start … end` of a source, which lie in one shard."""

    KIND: ClassVar[str] = "measure"
    WHAT: ClassVar[str] = "compiling"

    key: str  #: of the first sample
    shard: str  #: path or URL
    shard_size: int
    index: str  #: file of the index on this machine
    start: int
    end: int
    tokenizer: str  #: file of `save_tokenizer`
    compiler: CompilerConfig
    budget: RowBudget | None
    seed: int = 0  #: of the variants

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "MeasureJob":
        budget = entry["budget"]
        return MeasureJob(
            **entry
            | {
                "compiler": CompilerConfig.from_json(entry["compiler"]),
                "budget": RowBudget(**budget) if budget is not None else None,
            }
        )

    def run(self) -> Measured:
        """A sample that does not compile is a fault. Raises DataError when the shard cannot be read."""
        index, tokenizer = _open(self.index, Path(self.index).stat().st_mtime_ns), read_tokenizer(self.tokenizer)
        measured = Measured([], {})
        for number in range(self.start, self.end):
            entry = index.sample(number)
            try:
                if "json" not in entry.members:
                    raise SampleError(entry.key, f"the shard holds no {entry.key}.json")
                place = entry.members["json"]
                text = read_member(entry.key, Path(self.shard), place.offset, place.size, place.digest)
                parts = compile_entry(entry, text, tokenizer, self.compiler, self.budget)
                lengths = [[(len(part.ids), len(part.frames)) for part in parts]]
                # only streams have variants
                for variant in range(1, 1 + self.compiler.augment.measured_variants):
                    if parts[0].kind == "stream":
                        seed = variation_seed(self.seed, entry.key, variant)
                        varied = compile_entry(entry, text, tokenizer, self.compiler, self.budget, None, seed)
                        lengths.append([(len(part.ids), len(part.frames)) for part in varied])
                    else:
                        lengths.append(lengths[0])
                for part, own in enumerate(zip(*lengths, strict=True)):
                    measured.units.append((number, part, *(value for pair in own for value in pair)))
            except SampleError as error:
                measured.faults[number] = error.reason
        return measured

    def result(self, entry: Any) -> Measured:
        return Measured([tuple(unit) for unit in entry["units"]], dict(map(tuple, entry["faults"])))


@lru_cache(maxsize=4)
def _open(path: str, mtime_ns: int) -> SourceIndex:
    """The index of a file as it is at that time."""
    return open_index(Path(path), "")
