"""Letters come whole, each once."""

from moss_train.streams.config import TokenizerConfig
from moss_train.streams.growing_text import GrowingText
from moss_train.streams.tokenizer import load_tokenizer


def test_the_pieces_join_to_the_text_and_no_letter_is_cut():
    tokenizer = load_tokenizer(TokenizerConfig())
    text = "Grün 青い 🙂, it is."
    ids = tokenizer.encode(text)
    growing = GrowingText(tokenizer)
    pieces = [growing.add(token) for token in ids]
    assert "".join(pieces) == text and len(growing) == len(ids)
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)  # some letters take several tokens
