"""The chat template in ids: the pieces that a row, and a live conversation, is put together from.

Layout of the reference (`mllama` template, model_facts C.2):
`<bos> [<header> system <end> "\\n\\n" text <eot>] (<header> user <end> "\\n\\n" text <eot> <header> assistant
<end> "\\n\\n" answer <eot>)*`. Each stretch of text between special tokens is tokenised as one string, the
line breaks after a header included, as the reference's tokenizer does.
"""

from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS
from moss_train.streams.tokenizer import StreamTokenizer

HEADER_END = "\n\n"


class TurnTemplate:
    """Ids of the parts of a dialogue; none of them holds an anchor."""

    def __init__(self, tokenizer: StreamTokenizer):
        self._tokenizer = tokenizer
        self._special = tokenizer.special

    def system_prefix(self, system: str | None) -> list[int]:
        """Begin of text, and the system turn when there is one.

        A system text is written by whoever trains the model, so `<|silence|>` (and `<|...|>`) in it are the
        tokens themselves, as in the reference's own prompt; in user texts and replies they are characters.
        """
        ids = [self._special.begin_of_text]
        if system:
            ids += [*self._header("system"), *self._encode_trusted(HEADER_END + system), self._special.end_of_turn]
        return ids

    def user_turn(self, text: str) -> list[int]:
        """A user turn and the header of the answer: everything up to where the assistant begins."""
        return [*self.open_user(text), *self.end_user()]

    def close_turn(self) -> list[int]:
        """The token that ends the assistant's turn."""
        return [self._special.end_of_turn]

    def open_user(self, text: str) -> list[int]:
        """User header and the text up to the end of the turn or to the first medium in it."""
        return [*self._header("user"), *self._tokenizer.encode(HEADER_END + text)]

    def end_user(self) -> list[int]:
        """End of the user's turn and the header of the answer."""
        return [self._special.end_of_turn, *self._header("assistant"), *self._tokenizer.encode(HEADER_END)]

    def _header(self, role: str) -> list[int]:
        return [self._special.start_header, *self._tokenizer.encode(role), self._special.end_header]

    def _encode_trusted(self, text: str) -> list[int]:
        pieces: list[str | int] = [text]
        for role in ("silence", "ellipsis"):
            token = getattr(self._special, role)
            if token is not None:
                pieces = [part for piece in pieces for part in _split_at(piece, REFERENCE_SPECIAL_STRINGS[role], token)]
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self._tokenizer.encode(piece) if piece else []
        return ids


def _split_at(piece: str | int, string: str, token: int) -> list[str | int]:
    if isinstance(piece, int):
        return [piece]
    parts: list[str | int] = []
    for text in piece.split(string):
        parts += [text, token]
    return parts[:-1]
