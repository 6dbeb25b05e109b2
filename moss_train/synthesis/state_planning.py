"""Questions about structured captions: colour, place and count of what is on screen, and a description of it.

Times follow those of the rendered training clips (`data/synthetic/world.py`): questions fall a quarter between two
frames, and what changes first after an answer changes a frame later at the earliest.
"""

from dataclasses import replace

from moss_train.data.synthetic.world import ASKED_ABOUT, PAUSES
from moss_train.streams.media import SAME_MOMENT_S
from moss_train.synthesis.dialogue import Question, Task
from moss_train.synthesis.english import State, state_of
from moss_train.synthesis.scenario_planner import ScenarioPlanner
from moss_train.synthesis.state_answers import DESCRIBE, DESCRIPTION, QUESTIONS, description

CUT_IN = "Stop. "
#: each later change of an attribute makes questions about it so much more likely than `ASKED_ABOUT` says: about half of
#: all changes should ask for a revision, however many attributes there are
LEAN = 1.6
#: fewest frames from an answer to the next change
SETTLED = PAUSES["train"][0]


class StatePlanner(ScenarioPlanner):
    """Satisfies the `Planner` protocol."""

    scarce = {"after": 30.0, "interruption": 2.1, "two_questions": 1.2, "silent": 1.0}

    def __init__(self, task: Task):
        super().__init__(task)
        watch, captions = task.watch, task.timeline.captions
        self._shown: list[State | None] = [None] * (self._last + 1)  # by frame
        for caption in captions:
            first, end = watch.first_from(caption.start_s), watch.first_from(caption.end_s)
            for frame in range(max(0, first), min(end, self._last + 1)):
                self._shown[frame] = state_of(caption.text)
        visible = [frame for frame, state in enumerate(self._shown) if state is not None]
        self._appears = visible[0] if visible else None
        self._vanishes = visible[-1] + 1 if visible else None
        # what is remembered where nothing is shown, and the frames at which it changes
        self._known: list[State | None] = list(self._shown)
        for frame in range(1, self._last + 1):
            self._known[frame] = self._known[frame] or self._known[frame - 1]
        self._changes = [
            frame
            for frame in range(1, self._last + 1)
            if self._known[frame - 1] is not None and self._known[frame] != self._known[frame - 1]
        ]

    def questions(self, scenario: str, first_frame: int) -> list[Question] | None:
        if self._appears is None:
            return None
        return self._planned(scenario, first_frame)

    def _settled(self, answer_frame: int, frames: int = SETTLED) -> bool:
        """Whether nothing changes from an answer until so many frames after it."""
        return not any(answer_frame < change < answer_frame + frames for change in self._changes)

    def _steady(self, answer_frame: int, frames: int = SETTLED) -> bool:
        """The same, and what the answer is about was shown before the frame at which it is given."""
        return answer_frame not in self._changes and self._settled(answer_frame, frames)

    def _ask(
        self, t: float, answer_frame: int, avoid: str | None = None, steady_after: int | None = None
    ) -> Question | None:
        """A question about an attribute of what will be shown when it is answered: another than `avoid`, and one that
        does not change after the frame `steady_after`."""
        state = self._known[answer_frame]
        assert state is not None
        names = [
            name
            for name in QUESTIONS
            if name != avoid
            and state.value(name) is not None
            and (steady_after is None or not self._times_changed(name, steady_after))
        ]
        if not names:
            return None
        odds = [ASKED_ABOUT[name] * (1.0 + LEAN * self._times_changed(name, answer_frame)) for name in names]
        name = str(self._rng.choice(names, p=[one / sum(odds) for one in odds]))
        return Question(t, QUESTIONS[name], name)

    def _times_changed(self, attribute: str, after: int) -> int:
        known = self._known
        return sum(
            known[frame].value(attribute) != known[frame - 1].value(attribute)  # type: ignore[union-attr]
            for frame in self._changes
            if frame > after
        )

    def _before(self, first_frame: int, steady_after: int | None = None) -> list[Question] | None:
        appears = self._appears
        assert appears is not None
        if first_frame > 0 or appears < 1 or appears > self._last - 1 or not self._settled(appears):
            return None
        opening = self._rng.random() < 0.3
        t = self._task.watch.start_s if opening else self._time(self._between(0, appears - 1) + 0.25)
        question = self._ask(t, appears, steady_after=steady_after)
        return question and [question]

    def _moment(self, first_frame: int, needs: int = SETTLED) -> int | None:
        """A frame after which something is asked that is answered at the next: early, while something is shown and
        nothing changes for `needs` frames after the answer."""
        assert self._appears is not None
        start = max(first_frame, self._appears)
        fitting = [
            frame
            for frame in range(start, min(start + max(2, (self._last + 1 - start) // 6), self._last - 2) + 1)
            if self._shown[frame] is not None and self._shown[frame + 1] is not None and self._steady(frame + 1, needs)
        ]
        return fitting[self._between(0, len(fitting) - 1)] if fitting else None

    def _during(self, first_frame: int) -> list[Question] | None:
        frame = self._moment(first_frame)
        question = None if frame is None else self._ask(self._time(frame + 0.25), frame + 1)
        return question and [question]

    def _after(self, first_frame: int) -> list[Question] | None:
        assert self._vanishes is not None
        earliest, latest = max(first_frame, self._vanishes), self._last - 2
        if earliest > latest:
            return None
        frame = self._between(earliest, min(earliest + 2, latest))
        question = self._ask(self._time(frame + 0.25), frame + 1)
        return question and [question]

    def _describe(self, frame: int) -> Question:
        return Question(self._time(frame + 0.25), DESCRIBE, DESCRIPTION, stands=False)

    def _description(self, first_frame: int) -> list[Question] | None:
        """Nothing changes any more after it, since a description is not kept up to date."""
        start = max(first_frame, self._appears or 0, *(change - 1 for change in self._changes or [0]))
        if start > self._last - 3 or self._shown[start + 1] is None:
            return None
        return [self._describe(self._between(start, min(start + 4, self._last - 3)))]

    def _interruption(self, first_frame: int) -> list[Question] | None:
        """A description is cut after at most two of its frames, and the question that cuts it is answered at once."""
        heard = self._between(0, 1)
        frame = self._moment(first_frame, needs=heard + 1 + SETTLED)
        if frame is None or frame + heard + 2 > self._last - 1:
            return None
        # the description must still run when it is cut
        started, cut_t = frame + 1, self._time(frame + heard + 1.5)
        state = self._shown[started]
        assert state is not None
        if self._task.pace.say(description(state), self._time(started)).over_s <= cut_t + SAME_MOMENT_S:
            return None
        question = self._ask(cut_t, started + heard)
        return question and [self._describe(frame), replace(question, at_once=True, cut_in=CUT_IN)]

    def _two_questions(self, first_frame: int) -> list[Question] | None:
        """From the second question on only that one is kept up to date, so the answer to the first must stay true."""
        gap = self._between(1, 2)
        appears = self._appears
        assert appears is not None
        first: list[Question] | None = None
        answered = appears
        if self._rng.random() < 0.5:
            first = self._before(first_frame, steady_after=appears + gap)
        if not first:
            moment = self._moment(first_frame)
            if moment is None:
                return None
            answered = moment + 1
            question = self._ask(self._time(moment + 0.25), answered, steady_after=answered + gap)
            first = question and [question]
        frame = answered + gap
        if not first or frame > self._last - 2 or self._shown[frame + 1] is None or not self._steady(frame + 1):
            return None
        second = self._ask(self._time(frame + 0.25), frame + 1, avoid=first[0].topic)
        return second and [*first, second]
