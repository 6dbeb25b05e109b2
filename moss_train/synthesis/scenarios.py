"""The question planner of the rule-based writer: which behaviours a stream shows, drawn from a mix.

    before         asked before anything can be known
    during         asked in the middle
    after          asked when nothing new will come, answered from memory
    interruption   a long reply is cut by another question
    description    a long reply that is not cut
    two_questions  a second question takes the place of the first
    silent         nobody asks anything

A planner says which questions make up a scenario from a frame on, or that the timeline has no room for it.
"""

from typing import Protocol

from moss_train.synthesis.dialogue import Plan, Question, Task

SCENARIOS = ("before", "during", "after", "interruption", "description", "two_questions", "silent")


class Planner(Protocol):
    """One way to think of questions about a timeline."""

    scarce: dict[str, float]
    """Scenario → how much more often than its share it is tried, because few timelines allow it."""

    def questions(self, scenario: str, first_frame: int) -> list[Question] | None:
        """The questions of one scenario, none of them before `first_frame`; None when there is no room for it."""


def draw_plan(task: Task, planner: Planner) -> Plan:
    """One scenario after another, at intervals of about `question_every_s`, until the stream is over.

    A scenario without room leaves its share to the others. `silent` is a whole stream.
    """
    questions: list[Question] = []
    scenario: list[str] = []
    first_frame = 0
    while first_frame < task.watch.frames() - 2:
        names = [name for name in SCENARIOS if task.mix.get(name, 0.0) > 0 and not (scenario and name == "silent")]
        found: list[Question] | None = None
        while found is None and names:
            odds = [task.mix[name] * planner.scarce.get(name, 1.0) for name in names]
            name = str(task.rng.choice(names, p=[one / sum(odds) for one in odds]))
            names.remove(name)
            found = [] if name == "silent" else planner.questions(name, first_frame)
        if found is None:
            break
        scenario.append(name)
        questions += found
        if not found:
            break
        pause_s = task.question_every_s * (0.5 + float(task.rng.random()))
        first_frame = task.watch.first_from(found[-1].t + pause_s)
    return Plan(tuple(questions), tuple(scenario))
