"""What simple rules read out of captions: the state that a structured caption describes, who does what in a free one.

A structured caption is `[number] colour noun [on|at|in the place]`, as "two red blocks on the left". Everything else is
a free sentence, of which the grammatical subject is looked for among words for people and animals.
"""

import re
from dataclasses import dataclass

from moss_train.synthesis.captions import Caption, plain

COLOURS = "red green blue yellow orange purple pink brown black white grey gray".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
_STATE = re.compile(
    rf"^(?:(?P<count>an?|{'|'.join(NUMBERS)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<noun>[a-z]+)"
    r"(?: (?P<preposition>on|at|in) the (?P<place>[a-z]+))?$"
)
_PRONOUNS = {"he": "he", "she": "she", "they": "they", "it": "it"}
#: nouns a sentence may be about → pronoun; "" where English has none for one
_ACTORS = (
    dict.fromkeys("man boy guy gentleman father".split(), "he")
    | dict.fromkeys("woman girl lady mother".split(), "she")
    | dict.fromkeys(
        """men women boys girls ladies guys people children kids persons players dancers players teams dogs cats
        horses""".split(),
        "they",
    )
    | dict.fromkeys(
        """couple crowd group team band audience person child kid baby player dancer athlete gymnast instructor chef
        swimmer skier surfer runner rider coach referee""".split(),
        "",
    )
    | dict.fromkeys("dog cat horse bird camera".split(), "it")
)
_DETERMINERS = frozenset("the a an one two three four five some several many another this that these those".split())
#: after a noun they go on with its description: the verb comes later, and simple rules do not find it
_NO_VERB = frozenset("of and in with who that on at wearing".split())
_OPENERS = re.compile(
    r"^(?:(?:and )?(?:then|next|finally|afterwards?|meanwhile|suddenly|in the end|at the end|after that|first))\b,? *",
    re.IGNORECASE,
)
#: first words that lose their capital inside a sentence
_LOWERED = _DETERMINERS | set(_PRONOUNS) | {"his", "her", "their", "its", "there", "people", "we", "then", "next"}


@dataclass(frozen=True)
class State:
    """What a structured caption describes; None is what it does not say."""

    colour: str
    noun: str
    count: str | None
    place: str | None
    preposition: str | None

    def value(self, attribute: str) -> str | None:
        return getattr(self, attribute)


def state_of(text: str) -> State | None:
    """The state that a caption describes, or None when it is a free sentence."""
    found = _STATE.match(plain(text))
    if not found:
        return None
    count = found["count"]
    return State(
        found["colour"], found["noun"], "one" if count in ("a", "an") else count, found["place"], found["preposition"]
    )


@dataclass(frozen=True)
class Action:
    """Who does what in a free caption."""

    actor: str  #: noun, or a pronoun that stands for nobody named before
    pronoun: str  #: "" when the noun has none
    does: str  #: the sentence after the subject, "lifts a weight over his head."

    @property
    def plural(self) -> bool:
        return self.pronoun == "they"

    @property
    def named(self) -> bool:
        return self.actor not in _PRONOUNS

    def sentence(self) -> str:
        """What the actor does, as a part of a sentence: "he lifts a weight over his head."."""
        return f"{self.pronoun or 'the ' + self.actor} {self.does.rstrip('.!?,;: ')}."


def actions_of(captions: tuple[Caption, ...]) -> list[Action | None]:
    """The action of each caption, None where no actor is found. A pronoun stands for the last actor it fits."""
    actions: list[Action | None] = []
    last: dict[str, str] = {}  # pronoun → the last actor it fits
    for caption in captions:
        action = _action(caption.text)
        if action is not None:
            if not action.named:
                action = Action(last.get(action.pronoun, action.actor), action.pronoun, action.does)
            last[action.pronoun] = action.actor
        actions.append(action)
    return actions


def _action(text: str) -> Action | None:
    words = _OPENERS.sub("", " ".join(text.split())).split(" ")
    first = words[0].casefold().strip(",")
    if first in _PRONOUNS and len(words) > 1:
        return Action(first, _PRONOUNS[first], " ".join(words[1:]))
    start = 1 if first in _DETERMINERS else 0
    for place, word in enumerate(words[start : start + 4], start):
        noun = word.casefold()
        following = words[place + 1].casefold().strip(",.") if place + 1 < len(words) else ""
        if noun in _ACTORS and following and following not in _NO_VERB:
            return Action(noun, _ACTORS[noun], " ".join(words[place + 1 :]))
    return None


def sentence(text: str) -> str:
    """One line with a capital and a full stop, without what ties it to the sentence before ("Then, …")."""
    text = " ".join(text.split()).rstrip(",;: ")
    text = _OPENERS.sub("", text) or text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def after(opener: str, text: str) -> str:
    """A sentence after "Now" or "Then": "Now he sits down.", or "Now: Cut the wires." where its first word may be a
    name or a command."""
    head, _, rest = sentence(text).partition(" ")
    if head.casefold().strip(",") not in _LOWERED:
        return f"{opener}: {sentence(text)}"
    return f"{opener} {head.casefold()}" + (" " + rest if rest else "")
