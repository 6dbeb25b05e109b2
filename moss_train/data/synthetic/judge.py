"""Which answers mean the same in the procedural world of `scenes.py`."""

import re

from moss_train.data.synthetic.scenes import ATTRIBUTES

_WORDS = re.compile(r"\w+")
#: words that may surround the attribute's value without changing the answer
_FILLERS = frozenset({"now", "it", "is", "are", "there", "on", "at", "the", "block", "blocks"})
_VALUES = frozenset(value for values in ATTRIBUTES.values() for value in values)
_DIGITS = {"1": "one", "2": "two", "3": "three"}


class WorldJudge:
    """Two texts give the same answer when they name the same values of attributes, and nothing else, in any order.

    "Now blue." = "It is blue." = "blue"; "Red blue." is no answer to what is red or blue. Texts that name no value
    are the same when their words are. Satisfies the `Judge` protocol of the evaluation.
    """

    def same_answer(self, said: str, reference: str) -> bool:
        """True when `said` gives the answer that `reference` gives; False for two empty texts."""
        said_words, reference_words = _content(said), _content(reference)
        if not _VALUES.intersection(reference_words):
            return _all_words(said) == _all_words(reference) != []
        return sorted(said_words) == sorted(reference_words)


def _all_words(text: str) -> list[str]:
    return [_DIGITS.get(word, word) for word in _WORDS.findall(text.casefold())]


def _content(text: str) -> list[str]:
    return [word for word in _all_words(text) if word not in _FILLERS]
