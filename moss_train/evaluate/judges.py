"""Judges: does what was said give the same answer as the reference, and how well?"""

import importlib
import re
from collections import Counter
from typing import Protocol

from moss_train.data.synthetic.judge import WorldJudge
from moss_train.errors import ConfigError

JUDGES = ("text", "world")


class Judge(Protocol):
    """Decides about meaning, not wording. Must accept any text, also gibberish and the empty string.

    May also have `score(said, reference) -> float`, 1 (wrong) to 5 (as good as the reference); without one,
    `lexical_score` stands in.
    """

    def same_answer(self, said: str, reference: str) -> bool:
        """True when `said` gives the answer that `reference` gives."""
        ...


class TextJudge:
    """Equal words in equal order; case, punctuation and white space do not count.

    The judge for data without one of its own: strict, so its figures are a lower bound.
    """

    def same_answer(self, said: str, reference: str) -> bool:
        return words(said) == words(reference) != []


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def lexical_score(said: str, reference: str) -> float:
    """1 + 4 · F1 of the words that both have, counted as often as both have them."""
    mine, theirs = Counter(words(said)), Counter(words(reference))
    common, count = (mine & theirs).total(), mine.total() + theirs.total()
    return 1.0 + 4.0 * (2 * common / count if count else 0.0)


def score_of(judge: Judge, said: str, reference: str) -> float:
    """1 to 5: the judge's own score, else 5 for the same answer, else by the words."""
    own = getattr(judge, "score", None)
    if own is not None:
        return float(own(said, reference))
    return 5.0 if judge.same_answer(said, reference) else lexical_score(said, reference)


def check_judge(name: str, where: str = "judge") -> None:
    """Raise ConfigError unless `name` may be one; whether `module:Class` can be imported shows when it is loaded."""
    module, colon, attribute = name.partition(":")
    if name not in JUDGES and not (colon and module and attribute.isidentifier()):
        raise ConfigError(
            f"{where}={name!r}: legal values are {', '.join(JUDGES)}, or module:Class for one of your own"
        )


def load_judge(name: str) -> Judge:
    """The judge called `name`: `text` for any data, `world` for the built-in synthetic clips, `module:Class` for a
    class of your own, made without arguments."""
    check_judge(name)
    if name == "text":
        return TextJudge()
    if name == "world":
        return WorldJudge()
    module, _, attribute = name.partition(":")
    try:
        judge = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"judge={name!r}: {error}; give a class that can be imported from here") from error
    if not callable(getattr(judge, "same_answer", None)):
        raise ConfigError(f"judge={name!r}: has no method same_answer(said, reference)")
    return judge
