"""Answers about free captions: they are captions, or parts of them."""

from moss_train.synthesis.captions import Caption, meaning
from moss_train.synthesis.dialogue import Decision, Situation
from moss_train.synthesis.english import actions_of, after, sentence

NOW, SO_FAR = "now", "so far"
#: a sentence about what happens now is no answer any more so many seconds after its span
FRESH_S = 10.0
#: captions that one account of what has happened holds at most: the latest
LONGEST_STORY = 4


def decide_about_events(situation: Situation) -> Decision:
    """About what happens now, what has happened so far or, under any other topic, what the actor of that name does."""
    topic = situation.question.topic
    if topic == NOW:
        return _about_now(situation)
    if topic == SO_FAR:
        told = situation.seen[-LONGEST_STORY:]
        return Decision("answer", story(told), (min(caption.start_s for caption in told), told[-1].end_s))
    return _about_actor(situation, topic)


def story(told: tuple[Caption, ...]) -> str:
    """What has happened, one sentence after another."""
    first, *rest = (caption.text for caption in told)
    return " ".join([sentence(first), *(after("Then", part) for part in rest)])


def _about_now(situation: Situation) -> Decision:
    latest = situation.seen[-1]
    if situation.now_s - latest.seen_s > FRESH_S:
        return Decision("silence")
    if situation.said is None:
        return Decision("answer", sentence(latest.text))
    revision = after("Now", latest.text)
    if meaning(situation.said) in (meaning(revision), meaning(sentence(latest.text))):
        return Decision("confirm", situation.said, changed="event")
    return Decision("revise", revision, changed=NOW)


def _about_actor(situation: Situation, actor: str) -> Decision:
    """Captions about others leave the answer as it is."""
    actions = actions_of(situation.seen)
    number = max((n for n, action in enumerate(actions) if action is not None and action.actor == actor), default=-1)
    if number < 0:
        return Decision("silence")
    caption, action = situation.seen[number], actions[number]
    assert action is not None
    does = action.sentence()
    evidence = (caption.start_s, caption.end_s)
    if situation.said is None:
        fresh = situation.now_s - caption.seen_s <= FRESH_S
        return Decision("answer", does[0].upper() + does[1:], evidence) if fresh else Decision("silence")
    if meaning(situation.said) in (meaning(does), meaning(f"Now {does}")):
        return Decision("confirm", situation.said, changed="event")
    return Decision("revise", f"Now {does}", evidence, changed=actor)
