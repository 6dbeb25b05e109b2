"""Tokenizer files of an exported model: its own, with reserved tokens renamed where the reference renames them."""

import json
from pathlib import Path
from typing import Any

from moss_train.checkpoint.files import json_bytes, read_json
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS
from moss_train.streams.tokenizer import StreamTokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
RESERVED = "<|reserved_special_token_"  #: how names of Llama-3's unused tokens begin

#: Reserved tokens that MOSS-Video-Preview uses, by role; it renames them in its tokenizer and adds none.
REFERENCE_IDS = {"silence": 128011, "ellipsis": 128012, "video": 128255}

_COPIED = ("special_tokens_map.json", "chat_template.json", "chat_template.jinja")


def renames(tokenizer: StreamTokenizer) -> dict[str, str]:
    """Reserved token → the reference's string for the role it plays, where the tokenizer lacks that string."""
    names = {}
    for role, string in REFERENCE_SPECIAL_STRINGS.items():
        token = getattr(tokenizer.special, role)
        if token is not None and tokenizer.token(token).startswith(RESERVED):
            names[tokenizer.token(token)] = string
    return names


def tokenizer_files(tokenizer: StreamTokenizer, folder: Path | None, rename: bool) -> dict[str, bytes]:
    """File name → content of what transformers needs of the tokenizer.

    folder: where the tokenizer came from; its tokenizer_config.json and chat template are taken over when there are
    any. rename: give reserved tokens the names of their roles, as in the reference's published tokenizers.
    """
    names = renames(tokenizer) if rename else {}
    found: dict[str, Any] = {}
    if names:
        found[TOKENIZER] = _renamed(json.loads(tokenizer.definition), names)
    config = folder / TOKENIZER_CONFIG if folder is not None else None
    if config is not None and config.is_file():
        found[TOKENIZER_CONFIG] = _renamed(read_json(config), names)
    else:
        special = tokenizer.special
        found[TOKENIZER_CONFIG] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.token(special.begin_of_text),
            "eos_token": tokenizer.token(special.end_of_turn),
            "pad_token": tokenizer.token(special.padding),
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
    written = {TOKENIZER: tokenizer.definition.encode()}
    written |= {name: json_bytes(content, name) for name, content in found.items()}
    if folder is not None:
        written |= {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
    return written


def _renamed(content: Any, names: dict[str, str]) -> Any:
    """JSON in which every string and key that is one of `names` is replaced."""
    if isinstance(content, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [_renamed(value, names) for value in content]
    return names.get(content, content) if isinstance(content, str) else content
