"""What an answer must not say: anything that only captions hold which are not known yet, or the clock.

Words are compared by their stems. A word counts as leaked when a later caption has it and neither the captions known
so far nor the question do. Words of the grammar and of the templates ("now", "first") are no content.
"""

import re
from collections.abc import Iterable

_WORDS = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
#: no content: the grammar, and what the templates of an answer add
FUNCTION_WORDS = frozenset(
    """a about above after again all also an and another any are around as at away back be because been before being
    both but by can could did do does doing done down during each every few first for from further had has have
    having he her here hers him his how i if in into is it its itself just later less many me more most much my no
    nor not now of off on once only or other our out over own s same see seen several she should so some still such
    t than that the their them then there these they this those through thus to together too under until up upon us
    very was we were what when where which while who whom whose why will with would yet you your next finally far
    happening yes""".split()
)
NUMBERS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve".split(), map(str, range(13)), strict=True)
)
_UNIT = r"(?:s|sec|secs|seconds?|minutes?|mins?)"
_COUNT = rf"(?:\d+(?:\.\d+)?|{'|'.join(NUMBERS)})"
_CLOCK = re.compile(
    rf"\b\d{{1,2}}:\d{{2}}\b|\b\d+(?:\.\d+)?\s*{_UNIT}\b|\b{_COUNT}\s+{_UNIT}\b|\b(?:second|minute)\s+{_COUNT}\b"
    r"|\btimestamps?\b",
    re.IGNORECASE,
)
#: endings in the order in which they are tried; what must remain has three letters at least
_ENDINGS = ("ings", "ing", "edly", "ed", "ers", "ies", "es", "s", "ly", "er", "e", "y")


def stem(word: str) -> str:
    """The word without its ending, numbers as digits: "walks", "walking" and "walked" are one word."""
    word = NUMBERS.get(word, word).removesuffix("'s")
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2]:  # "running": runn
        word = word[:-1]
    return word


def content(texts: Iterable[str]) -> set[str]:
    """The stems of all content words and numbers of the texts."""
    words = (word for text in texts for word in _WORDS.findall(text.casefold().replace("’", "'")))
    return {stem(word) for word in words if word not in FUNCTION_WORDS and word.split("'")[0] not in FUNCTION_WORDS}


def leaked(text: str, seen: Iterable[str], later: Iterable[str]) -> list[str]:
    """The words of `text`, in their order, that `later` holds and `seen` does not; [] when it leaks nothing."""
    forbidden = content(later) - content(seen)
    words = _WORDS.findall(text.casefold().replace("’", "'"))
    return [word for word in dict.fromkeys(words) if word not in FUNCTION_WORDS and stem(word) in forbidden]


def clock_words(text: str, seen: Iterable[str]) -> list[str]:
    """Times that `text` mentions and no text of `seen` does: a viewer hears no clock."""
    known = " ".join(seen).casefold()
    return [found for found in _CLOCK.findall(text) if found.casefold() not in known]
