"""Judges: does what was said give the same answer as the reference?"""

import re
from typing import Protocol

from moss_train.data.synthetic.judge import WorldJudge
from moss_train.errors import ConfigError

JUDGES = ("text", "world")


class Judge(Protocol):
    """Decides about meaning, not wording. Must accept any text, also gibberish and the empty string."""

    def same_answer(self, said: str, reference: str) -> bool:
        """True when `said` gives the answer that `reference` gives."""
        ...


class TextJudge:
    """Equal words in equal order; case, punctuation and white space do not count.

    The judge for data without one of its own: strict, so its figures are a lower bound.
    """

    def same_answer(self, said: str, reference: str) -> bool:
        return _words(said) == _words(reference) != []


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def load_judge(name: str) -> Judge:
    """The judge called `name`: `text` for any data, `world` for the built-in synthetic clips."""
    if name == "text":
        return TextJudge()
    if name == "world":
        return WorldJudge()
    raise ConfigError(f"judge={name!r}: legal values are {', '.join(JUDGES)}")
