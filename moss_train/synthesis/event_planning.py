"""Questions about free captions: what happens now, what somebody does, what has happened so far."""

from dataclasses import replace

from moss_train.streams.media import SAME_MOMENT_S
from moss_train.synthesis.dialogue import Question, Situation, Task, shown_by
from moss_train.synthesis.english import actions_of
from moss_train.synthesis.event_answers import LONGEST_STORY, NOW, SO_FAR, decide_about_events, story
from moss_train.synthesis.scenario_planner import ScenarioPlanner
from moss_train.synthesis.state_planning import CUT_IN

WHAT_NOW = ("What is happening now?", "What is going on?", "Tell me what is happening.")
WHAT_SO_FAR = ("What has happened so far?", "Tell me what you have seen so far.")
#: how often a question is about one actor rather than about everything, where an actor is known
ABOUT_ACTOR = 0.4


class EventPlanner(ScenarioPlanner):
    """Satisfies the `Planner` protocol."""

    scarce: dict[str, float] = {}

    def __init__(self, task: Task):
        super().__init__(task)
        self._changes = [change.frame for change in task.changes]

    def questions(self, scenario: str, first_frame: int) -> list[Question] | None:
        if not self._changes:
            return None
        return self._planned(scenario, first_frame)

    def _one_of(self, texts: tuple[str, ...]) -> str:
        return texts[self._between(0, len(texts) - 1)]

    def _answered(self, question: Question) -> int | None:
        """The frame at which a question is answered if nothing comes between; None: never."""
        watch = self._task.watch
        first = watch.last_until(question.t) + 1
        for frame in [first, *(change for change in self._changes if change > first)]:
            seen = self._task.timeline.seen(watch.time(frame))
            situation = Situation(question, watch.time(frame), seen, seen, None)
            if frame <= self._last and seen and decide_about_events(situation).action == "answer":
                return frame
        return None

    def _ask(self, t: float, avoid: str = "") -> Question | None:
        """A question about what happens now or about somebody seen by then; None when it would never be answered."""
        seen = self._task.timeline.seen(shown_by(self._task.watch, t)) if t > self._task.watch.start_s else ()
        actors = [action for action in actions_of(seen) if action is not None and action.actor != avoid]
        named = [action for action in actors if action.named]
        about_actor = self._rng.random() < ABOUT_ACTOR
        candidates = []
        if named:
            actor, verb = named[-1].actor, "are" if named[-1].plural else "is"
            candidates.append(Question(t, f"What {verb} the {actor} doing?", actor))
        if avoid != NOW:
            candidates.insert(0 if not about_actor else len(candidates), Question(t, self._one_of(WHAT_NOW), NOW))
        return next((question for question in candidates if self._answered(question) is not None), None)

    def _look_back(self, t: float) -> Question:
        return Question(t, self._one_of(WHAT_SO_FAR), SO_FAR, stands=False)

    def _before(self, first_frame: int) -> list[Question] | None:
        appears = self._changes[0]
        if first_frame > 0 or appears < 1:
            return None
        opening = self._rng.random() < 0.3
        t = self._task.watch.start_s if opening else self._time(self._between(0, appears - 1) + 0.25)
        question = self._ask(t)
        return question and [question]

    def _moment(self, first_frame: int) -> int | None:
        """A frame at which something is known and after which something becomes known."""
        return self._soon(max(first_frame, self._changes[0]), min(self._changes[-1] - 1, self._last - 2))

    def _soon(self, low: int, high: int) -> int | None:
        """A frame in [low, high], within the time to the next scenario; None when there is none."""
        high = min(high, low + round(self._task.question_every_s * self._task.watch.fps))
        return self._between(low, high) if low <= high else None

    def _during(self, first_frame: int) -> list[Question] | None:
        frame = self._moment(first_frame)
        question = None if frame is None else self._ask(self._time(frame + 0.25))
        return question and [question]

    def _late(self, first_frame: int, earliest: int) -> int | None:
        return self._soon(max(first_frame, earliest), self._last - 2)

    def _after(self, first_frame: int) -> list[Question] | None:
        frame = self._late(first_frame, self._changes[-1])
        return None if frame is None else [self._look_back(self._time(frame + 0.25))]

    def _description(self, first_frame: int) -> list[Question] | None:
        frame = self._late(first_frame, self._changes[0])
        return None if frame is None else [self._look_back(self._time(frame + 0.25))]

    def _interruption(self, first_frame: int) -> list[Question] | None:
        frame = self._late(first_frame, self._changes[0])
        if frame is None or frame + 2 > self._last - 1:
            return None
        started_s, cut_t = self._time(frame + 1), self._time(frame + 1.5)
        told = self._task.timeline.seen(started_s)[-LONGEST_STORY:]
        if self._task.pace.say(story(told), started_s).over_s <= cut_t + SAME_MOMENT_S:
            return None
        question = self._ask(cut_t)
        return question and [
            self._look_back(self._time(frame + 0.25)),
            replace(question, at_once=True, cut_in=CUT_IN),
        ]

    def _two_questions(self, first_frame: int) -> list[Question] | None:
        first = self._during(first_frame)
        answered = self._answered(first[0]) if first else None
        if not first or answered is None:
            return None
        frame = answered + self._between(1, max(1, round(4 * self._task.watch.fps)))
        if frame > self._last - 2:
            return None
        second = self._ask(self._time(frame + 0.25), avoid=first[0].topic)
        return second and [*first, second]
