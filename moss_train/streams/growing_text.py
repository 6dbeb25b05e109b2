"""The text of a reply while its tokens come one by one."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What turns ids into text; `StreamTokenizer` does."""

    def decode(self, ids: Sequence[int]) -> str: ...


class GrowingText:
    """A letter may take several tokens: until it is whole its bytes decode to a replacement mark, and nothing is given.
    It comes with the last of them."""

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  #: letters

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(self, token: int) -> str:
        """The letters that `token` completes, "" when there are none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new, self._given = text[self._given :], len(text)
        return new
