"""What planners of questions share: a scenario by its name, numbers drawn, times of frames."""

from moss_train.synthesis.dialogue import Question, Task


class ScenarioPlanner:
    """A subclass has a method of the same name with an underscore for each scenario in which something is asked."""

    def __init__(self, task: Task):
        self._task = task
        self._rng = task.rng
        self._last = task.watch.frames() - 1

    def _planned(self, scenario: str, first_frame: int) -> list[Question] | None:
        return getattr(self, f"_{scenario}")(first_frame)

    def _between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self._rng.integers(low, high + 1))

    def _time(self, frame: float) -> float:
        return self._task.watch.start_s + frame / self._task.watch.fps
