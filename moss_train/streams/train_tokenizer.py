"""Trains the small tokenizer shipped with the package: `python -m moss_train.streams.train_tokenizer [output.json]`.

Byte-level BPE with Llama 3's way of splitting text into words, 1,024 rows with the special tokens, the
anchor outside them as in Llama 3.2 Vision. The text it learns from is `assets/tokenizer_corpus.txt` and the
words below, each of which becomes one token, at the start of a line or after a space, capitalised or not.
The same inputs give the same file.
"""

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS
from moss_train.streams.tokenizer import SHIPPED_TOKENIZER

HEAD_ROWS = 1024
CORPUS = Path(__file__).parent / "assets" / "tokenizer_corpus.txt"

WORDS = """
red green blue yellow white orange purple cyan black grey pink brown
left right top bottom middle centre corner above below inside outside near
zero one two three four five six seven eight nine ten
block blocks ball balls square squares circle circles triangle triangles ring star cube shape shapes object objects
what where how many which when who why colour side number count
is are was were be it its there the a an and or not no yes now still again only then
in on at of to from with by here this that these they he she you I your my
moving moves moved turns turned changed changes appears appeared gone stopped still nothing none same
see say tell please stop wait look describe happening
system user assistant video frame answer question camera scene
""".split()

#: Llama 3's pre-tokenisation
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_forms() -> list[str]:
    """Every word as it stands at the start of a line and after a space, plain and capitalised."""
    return [
        prefix + form
        for word in sorted(set(WORDS))
        for form in sorted({word, word.capitalize()})
        for prefix in ("", " ")
    ]


def train() -> Tokenizer:
    """The tokenizer; raises ValueError when a word of the list needs more than one token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # the anchor is last: it has no row in the head
    special = [string for role, string in REFERENCE_SPECIAL_STRINGS.items() if role != "anchor"]
    special.append(REFERENCE_SPECIAL_STRINGS["anchor"])
    trainer = BpeTrainer(
        vocab_size=HEAD_ROWS - (len(special) - 1),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = CORPUS.read_text(encoding="utf-8").splitlines(keepends=True)
    # a word list repeated often outweighs the prose, so each of its forms ends as one token
    tokenizer.train_from_iterator(
        [*lines, *(form for form in word_forms() for _ in range(200)), *["\n\n"] * 200], trainer
    )
    tokenizer.add_special_tokens(special)
    split = [form for form in word_forms() if len(tokenizer.encode(form).ids) != 1]
    if split:
        raise ValueError(f"{len(split)} words need more than one token, e.g. {split[:8]}; shorten the word list")
    return tokenizer


def main(arguments: list[str]) -> int:
    output = Path(arguments[0]) if arguments else SHIPPED_TOKENIZER
    output.write_text(train().to_str(pretty=True) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
