"""The tokenizer as the rest of the project sees it: plain text in, ids out, and special tokens by their role."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from moss_train.errors import ConfigError
from moss_train.streams.config import OPTIONAL_ROLES, SPECIAL_STRINGS, THINK_STRINGS, TokenizerConfig

#: roles that count in the fingerprint where no token plays them: optional ones named later do not change it
_OLDEST = frozenset({"ellipsis"})

SHIPPED_TOKENIZER = Path(__file__).parent / "assets" / "tokenizer.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens by role (model_facts B)."""

    begin_of_text: int
    end_of_text: int
    start_header: int
    end_header: int
    end_of_turn: int
    silence: int  #: "say nothing now"
    video: int  #: stands for a whole video in the reference's data; never in a compiled row
    anchor: int  #: the token a frame puts in the text
    padding: int
    ellipsis: int | None = None
    think_start: int | None = None  #: before and
    think_end: int | None = None  #: after what a think unit says
    skip: int | None = None  #: stands in a think unit that says nothing


class StreamTokenizer:
    """A Hugging Face tokenizer whose special tokens never come from text, only from the compiler.

    Picklable, so that loader workers can hold one.
    """

    def __init__(self, definition: str, special: SpecialTokens, vocabulary_size: int):
        """`definition` is the text of a `tokenizer.json`; `load_tokenizer` finds the other two."""
        self.definition = definition
        self.special = special
        self.vocabulary_size = vocabulary_size  #: rows of the output head
        self._tokenizer = Tokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True  # special strings in a text are text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __reduce__(self) -> tuple:
        return StreamTokenizer, (self.definition, self.special, self.vocabulary_size)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Nothing is added, and special strings in it are encoded as ordinary characters."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens appear as their strings."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def token(self, token: int) -> str:
        """The tokenizer's own name of one id, for tables and logs."""
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any id of any text could change: part of the data order's and the checkpoint's identity."""
        special = {role: token for role, token in asdict(self.special).items() if token is not None or role in _OLDEST}
        identity = [json.loads(self.definition), special, self.vocabulary_size]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def load_tokenizer(config: TokenizerConfig) -> StreamTokenizer:
    """The tokenizer of `config`; raises ConfigError when the file or a role's token is missing."""
    config.validate()
    path = SHIPPED_TOKENIZER if config.path is None else Path(config.path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        definition = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception for a malformed definition
        raise ConfigError(
            f"tokenizer.path={config.path!r}: cannot read {path.name} as a tokenizer ({error}); "
            "give a tokenizer.json, a folder that holds one, or null for the shipped one"
        ) from error
    if config.think_tokens:
        missing = [role for role in THINK_STRINGS if role not in config.special_ids]
        tokenizer.add_special_tokens([(SPECIAL_STRINGS | config.special)[role] for role in missing])
        definition = tokenizer.to_str()
    special = _find_special(tokenizer, config)
    return StreamTokenizer(definition, special, _vocabulary_size(tokenizer, special, config))


def _find_special(tokenizer: Tokenizer, config: TokenizerConfig) -> SpecialTokens:
    ids = dict(config.special_ids)
    strings = SPECIAL_STRINGS | config.special
    total = tokenizer.get_vocab_size(with_added_tokens=True)
    for role, string in strings.items():
        if role in ids:
            if tokenizer.id_to_token(ids[role]) is None:
                raise ConfigError(f"tokenizer.special_ids.{role}={ids[role]}: no such id among the {total} of this one")
            continue
        token = tokenizer.token_to_id(string)
        if token is None and role not in OPTIONAL_ROLES:
            raise ConfigError(
                f"tokenizer: it has no token {string!r} for the role {role}; "
                f"name another string in tokenizer.special.{role} or a reserved id in tokenizer.special_ids.{role}"
            )
        if token is not None:
            ids[role] = token
    added = tokenizer.get_added_tokens_decoder()
    for role in THINK_STRINGS:  # some tokenizers have such strings as text that is not special
        named = role in config.special or role in config.special_ids
        if not named and role in ids and not (ids[role] in added and added[ids[role]].special):
            del ids[role]
    for role, token in ids.items():
        if token not in added or not added[token].special:
            raise ConfigError(
                f"tokenizer: {tokenizer.id_to_token(token)!r} ({role}) is not marked special, so texts could contain "
                f'it; set "special": true in tokenizer.json or choose another token in tokenizer.special.{role}'
            )
    clash = [role for role in ids if list(ids.values()).count(ids[role]) > 1]
    if clash:
        raise ConfigError(f"tokenizer: the roles {', '.join(clash)} share one token; give each its own")
    return SpecialTokens(**ids)


def _vocabulary_size(tokenizer: Tokenizer, special: SpecialTokens, config: TokenizerConfig) -> int:
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    size = config.vocabulary_size
    if size is None:
        return highest if special.anchor == highest else highest + 1
    beyond = [token for token in tokenizer.get_vocab(with_added_tokens=True).values() if token >= size]
    if any(token != special.anchor for token in beyond):
        raise ConfigError(
            f"tokenizer.vocabulary_size={size} leaves ids up to {max(beyond)} without a row of the head; "
            f"use at least {highest if special.anchor == highest else highest + 1}"
        )
    return size
