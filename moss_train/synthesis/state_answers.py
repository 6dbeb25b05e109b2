"""Answers about structured captions, worded as those of the rendered clips."""

from moss_train.synthesis.dialogue import Decision, Situation
from moss_train.synthesis.english import State, state_of

QUESTIONS = {"colour": "What colour is it?", "place": "Where is it?", "count": "How many are there?"}
DESCRIPTION = "description"
DESCRIBE = "Describe it."
TOPICS = (*QUESTIONS, DESCRIPTION)


def attribute_answer(state: State, attribute: str) -> str:
    return f"It is {state.value(attribute)}."


def attribute_revision(state: State, attribute: str) -> str:
    return f"It is {state.value(attribute)} now."


def description(state: State) -> str:
    """All that a structured caption says, as a sentence."""
    parts = [f"It is {state.colour}"]
    if state.place:
        parts.append(f"{state.preposition} the {state.place}")
    if state.count:
        parts.append(f"and there {'is' if state.count == 'one' else 'are'} {state.count} {state.noun}")
    return ", ".join(parts) + "."


def decide_about_state(situation: Situation) -> Decision:
    """What was last shown holds, also when it is gone."""
    topic = situation.question.topic
    latest = state_of(situation.seen[-1].text)
    assert latest is not None  # the planner asks about structured captions only
    if topic == DESCRIPTION:
        return Decision("answer", description(latest))
    if latest.value(topic) is None:
        return Decision("silence")
    answer, revision = attribute_answer(latest, topic), attribute_revision(latest, topic)
    if situation.said is None:
        return Decision("answer", answer)
    if situation.said in (answer, revision):
        before = len(situation.seen) - len(situation.news)
        changed = _changed(situation.seen[before - 1].text, latest)
        # what changed and changed back between two frames, or during a reply, was no change to anybody
        return Decision("confirm", answer, changed=changed) if changed else Decision("silence")
    return Decision("revise", revision, changed=topic)


def _changed(before: str, now: State) -> str:
    """The first attribute in which a state differs from the one before."""
    earlier = state_of(before)
    assert earlier is not None
    return next((name for name in QUESTIONS if earlier.value(name) != now.value(name)), "")
