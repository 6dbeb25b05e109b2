"""The shipped tokenizer, foreign tokenizers, and that special tokens never come from text."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import tokenizer
from tokenizers import Tokenizer

from moss_train.errors import ConfigError
from moss_train.streams import train_tokenizer
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS, TokenizerConfig
from moss_train.streams.tokenizer import SHIPPED_TOKENIZER, load_tokenizer


def test_special_roles_of_the_shipped_tokenizer():
    special = tokenizer().special
    for role, string in REFERENCE_SPECIAL_STRINGS.items():
        assert tokenizer().token(getattr(special, role)) == string
    assert tokenizer().vocabulary_size == 1024
    assert special.anchor == tokenizer().vocabulary_size  # outside the head, like the reference's
    assert len({getattr(special, role) for role in REFERENCE_SPECIAL_STRINGS}) == len(REFERENCE_SPECIAL_STRINGS)


def test_words_of_the_synthetic_world_are_one_token():
    words = "red green blue yellow white orange purple cyan left right top bottom middle".split()
    words += "one two three four five six block ball square".split()
    words += "what where how many colour is it there nothing now user assistant system".split()
    for word in words:
        for form in (word, word.capitalize(), " " + word, " " + word.capitalize()):
            assert len(tokenizer().encode(form)) == 1, form
    assert len(tokenizer().encode("What colour is it?")) == 5
    assert len(tokenizer().encode("\n\n")) == 1


def test_the_shipped_file_is_what_the_script_makes():
    made = json.loads(train_tokenizer.train().to_str())
    assert made == json.loads(SHIPPED_TOKENIZER.read_text(encoding="utf-8"))


@settings(deadline=None)  # other work may hold the machine
@given(st.text())
def test_text_survives(text):
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert not set(ids) & {getattr(tokenizer().special, role) for role in REFERENCE_SPECIAL_STRINGS}


@settings(deadline=None)  # other work may hold the machine
@given(st.lists(st.sampled_from([*REFERENCE_SPECIAL_STRINGS.values(), " ", "a", "<|", "|>"])).map("".join))
def test_special_strings_are_text(text):
    assert max(tokenizer().encode(text), default=0) < tokenizer().special.begin_of_text
    copy = pickle.loads(pickle.dumps(tokenizer()))  # as loader workers get it
    assert copy.encode(text) == tokenizer().encode(text) and copy.fingerprint == tokenizer().fingerprint


def foreign(folder, edit) -> None:
    definition = json.loads(SHIPPED_TOKENIZER.read_text(encoding="utf-8"))
    edit(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")


def rename(definition: dict, old: str, new: str) -> None:
    for token in definition["added_tokens"]:
        if token["content"] == old:
            token["content"] = new


def test_a_foreign_tokenizer_with_other_names(tmp_path):
    foreign(tmp_path, lambda d: (rename(d, "<|silence|>", "<|reserved_3|>"), rename(d, "<|image|>", "<image>")))
    with pytest.raises(ConfigError, match="no token '<|silence|>' for the role silence".replace("|", r"\|")):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    silence = tokenizer().special.silence
    config = TokenizerConfig(path=str(tmp_path), special={"anchor": "<image>"}, special_ids={"silence": silence})
    loaded = load_tokenizer(config)
    assert loaded.special.silence == silence and loaded.vocabulary_size == 1024
    assert loaded.encode("<image>")[0] != loaded.special.anchor
    assert loaded.fingerprint != tokenizer().fingerprint
    by_file = load_tokenizer(
        TokenizerConfig(str(tmp_path / "tokenizer.json"), config.special, config.special_ids, vocabulary_size=2048)
    )
    assert by_file.vocabulary_size == 2048


def test_an_anchor_within_the_vocabulary(tmp_path):
    """As in MOSS-VL, whose image token is an ordinary row of the head."""
    config = TokenizerConfig(special={"anchor": "<|...|>", "ellipsis": "<|image|>"})
    assert load_tokenizer(config).vocabulary_size == 1025


def test_a_begin_token_the_tokenizer_would_add_is_not_added(tmp_path):
    def add_template(definition: dict) -> None:
        begin = "<|begin_of_text|>"
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [tokenizer().special.begin_of_text], "tokens": [begin]}},
        }

    foreign(tmp_path, add_template)
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("red").ids) == 2
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path))).encode("red") == tokenizer().encode("red")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "/nowhere/at/all"}, "cannot read"),
        ({"special": {"shout": "!"}}, "'shout' is no role"),
        ({"special": {"silence": "<|quiet|>"}}, "no token '<.quiet.>' for the role silence"),
        ({"special_ids": {"silence": 99999}}, "no such id"),
        ({"special_ids": {"silence": -1}}, "is negative"),
        ({"special_ids": {"silence": 5}}, "not marked special"),
        ({"special": {"silence": "<|video|>"}}, "share one token"),
        ({"vocabulary_size": 1000}, "without a row"),
        ({"vocabulary_size": 0}, "must be positive"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(TokenizerConfig(**fields))
