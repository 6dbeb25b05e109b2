"""The rule-based writer: deterministic, offline, without any model. The default.

Structured captions ("two red blocks on the left") are asked for their attributes; the answers are worded as those of
the rendered clips. Free captions are asked what happens, what somebody does and what has happened so far; the answers
are (parts of) captions. Which of the two a video gets depends on whether all of its captions are structured.
"""

from moss_train.synthesis.dialogue import Decision, Plan, Situation, Task
from moss_train.synthesis.english import state_of
from moss_train.synthesis.event_answers import decide_about_events
from moss_train.synthesis.event_planning import EventPlanner
from moss_train.synthesis.scenarios import draw_plan
from moss_train.synthesis.state_answers import TOPICS, decide_about_state
from moss_train.synthesis.state_planning import StatePlanner


class RuleWriter:
    """Satisfies the `Writer` protocol; holds no state."""

    async def plan(self, task: Task) -> Plan:
        structured = all(state_of(caption.text) for caption in task.timeline.captions)
        return draw_plan(task, StatePlanner(task) if structured else EventPlanner(task))

    async def decide(self, situation: Situation) -> Decision:
        if not situation.seen:
            return Decision("silence")
        about_state = situation.question.topic in TOPICS
        return decide_about_state(situation) if about_state else decide_about_events(situation)
