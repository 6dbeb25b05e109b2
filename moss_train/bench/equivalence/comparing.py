"""Run cases and compare each with the reference of its problem."""

import shutil
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.compare import Comparison, compare
from moss_train.bench.equivalence.outcome import Outcome, read_tensors
from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.equivalence.reference import train_reference
from moss_train.bench.equivalence.training import Job, same_figures, train_case

DEADLINE_S = 180.0  #: of one case; a few seconds are used on two cores that are not busy otherwise
_REFERENCE_S = 600.0  #: for a reference, which may try several seeds
_REFERENCES_KEPT = 32  #: a few megabytes each


class Comparer:
    """Ranks for the cases, one process for the references, which are made once per problem. A context manager."""

    def __init__(self, ranks: int = 8):
        self.ranks = Ranks(ranks)
        self._alone = Ranks(1)
        self._folder = Path(tempfile.mkdtemp(prefix="moss_equivalence_"))
        self._reference_path = self._folder / "reference.safetensors"
        self._begun: Problem | None = None  #: whose reference is being made
        self._references: OrderedDict[Problem, tuple[Problem, Outcome]] = OrderedDict()

    def __enter__(self) -> "Comparer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. May be called twice."""
        self.ranks.close()
        self._alone.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def compare(
        self, case: Case, job: Job = train_case, deadline_s: float = DEADLINE_S, ahead: Problem | None = None
    ) -> Comparison:
        """How `case`, trained by `job`, differs from its reference. JobError when it raises or does not end.

        ahead: whose reference is made meanwhile, because it is wanted next.
        """
        problem, expected = self.reference(case.problem)
        if ahead is not None:
            self._begin(ahead)
        case = replace(case, problem=problem)
        return compare(case, self.train(case, job, deadline_s), expected)

    def reference(self, problem: Problem) -> tuple[Problem, Outcome]:
        """The reference, and the problem with the seed that the reference has found to be good."""
        self._begin(problem)
        if self._begun == problem:
            self._finish()
        self._references.move_to_end(problem)
        return self._references[problem]

    def _begin(self, problem: Problem) -> None:
        if problem in self._references or problem == self._begun:
            return
        if self._begun is not None:
            self._finish()
        self._alone.start(1, train_reference, problem, str(self._reference_path), deadline_s=_REFERENCE_S)
        self._begun = problem

    def _finish(self) -> None:
        problem, self._begun = self._begun, None
        ((settled, steps, trained),) = self._alone.finish()
        self._references[problem] = settled, Outcome(steps, trained, read_tensors(self._reference_path))
        if len(self._references) > _REFERENCES_KEPT:
            self._references.popitem(last=False)

    def train(self, case: Case, job: Job = train_case, deadline_s: float = DEADLINE_S) -> Outcome:
        """What `case`, trained by `job`, leaves behind."""
        path = self._folder / "case.safetensors"
        path.unlink(missing_ok=True)
        results = self.ranks.run(case.world_size, job, case, str(path), deadline_s=deadline_s)
        steps, trained = results[0]
        for rank, (others, _) in enumerate(results):
            if not same_figures(steps, others):
                raise AssertionError(f"ranks 0 and {rank} report other figures:\n{steps}\n{others}")
        return Outcome(steps, trained, read_tensors(path))
