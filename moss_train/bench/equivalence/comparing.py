"""Run cases and compare each with the reference of its problem."""

import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.compare import Comparison, compare
from moss_train.bench.equivalence.outcome import Outcome, read_tensors
from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.equivalence.reference import train_reference
from moss_train.bench.equivalence.training import Job, same_figures, train_case

DEADLINE_S = 120.0  #: of one case; a small fraction is used even on two busy cores
_REFERENCES_KEPT = 32  #: a few megabytes each


class Comparer:
    """Ranks for the cases, one process for the references, which are made once per problem. A context manager."""

    def __init__(self, ranks: int = 8):
        self.ranks = Ranks(ranks)
        self._alone = Ranks(1)
        self._folder = Path(tempfile.mkdtemp(prefix="moss_equivalence_"))
        self._references: OrderedDict[Problem, Outcome] = OrderedDict()

    def __enter__(self) -> "Comparer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. May be called twice."""
        self.ranks.close()
        self._alone.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def compare(self, case: Case, job: Job = train_case, deadline_s: float = DEADLINE_S) -> Comparison:
        """How `case`, trained by `job`, differs from its reference. JobError when it raises or does not end."""
        found, expected = self.outcomes(case, job, deadline_s)
        return compare(case, found, expected)

    def outcomes(self, case: Case, job: Job = train_case, deadline_s: float = DEADLINE_S) -> tuple[Outcome, Outcome]:
        """What `case` and its reference leave behind; both run at the same time."""
        reference = self._folder / "reference.safetensors"
        missing = case.problem not in self._references
        if missing:
            self._alone.start(1, train_reference, case.problem, str(reference), deadline_s=deadline_s)
        try:
            found = self._trained(case, job, deadline_s)
        finally:
            if missing:
                ((steps, trained),) = self._alone.finish()
                self._references[case.problem] = Outcome(steps, trained, read_tensors(reference))
                if len(self._references) > _REFERENCES_KEPT:
                    self._references.popitem(last=False)
        self._references.move_to_end(case.problem)
        return found, self._references[case.problem]

    def _trained(self, case: Case, job: Job, deadline_s: float) -> Outcome:
        path = self._folder / "case.safetensors"
        path.unlink(missing_ok=True)
        results = self.ranks.run(case.world_size, job, case, str(path), deadline_s=deadline_s)
        steps, trained = results[0]
        for rank, (others, _) in enumerate(results):
            if not same_figures(steps, others):
                raise AssertionError(f"ranks 0 and {rank} report other figures:\n{steps}\n{others}")
        return Outcome(steps, trained, read_tensors(path))
