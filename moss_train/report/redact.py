"""Secrets leave no trace in what is written down about a run."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"

#: words of a key that make its value a secret; a word is what stands between underscores, dots, dashes and humps
_SECRET_WORDS = {
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "token",
    "bearer",
}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("signing", "key"), ("auth", "key")}
_SECRET_VALUE = re.compile(
    r"""(?x)
    ^(sk-|hf_|ghp_|gho_|github_pat_|glpat-|xox[abpr]-|AKIA|ASIA|AIza|ya29\.)[\w\-.]{8,}   # keys that show what they are
    | ^eyJ[\w-]{8,}\.[\w-]{8,}\.                                                          # JSON web tokens
    | -----BEGIN[ A-Z]*PRIVATE\ KEY
    """
)
_SPECIAL_TOKEN = re.compile(r"<[^<>]*>")  # `pad_token: <|pad|>` is a word of a vocabulary
_USER_IN_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^/\s:@]*:[^/\s@]+@")
_SIGNATURE_IN_ADDRESS = re.compile(
    r"(?i)([?&](?:x-amz-signature|x-amz-credential|x-goog-signature|sig|signature|token)=)[^&\s]+"
)


def redact(value: Any, key: str = "") -> Any:
    """A copy of nested `value` in which secrets are replaced by `[hidden]`.

    Secret is what stands under a key that says so (`api_key`, `password`, `hub_token`), what looks like a key of a
    known service, and the user part and the signature of an address.
    """
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value and is_secret_key(key) and not _SPECIAL_TOKEN.fullmatch(value):
        return HIDDEN
    if _SECRET_VALUE.search(value):
        return HIDDEN
    value = _USER_IN_ADDRESS.sub(lambda match: f"{match['scheme']}{HIDDEN}@", value)
    return _SIGNATURE_IN_ADDRESS.sub(lambda match: match[1] + HIDDEN, value)


def is_secret_key(key: str) -> bool:
    """Whether a setting of this name holds a secret: `hub_token` does, `tokens_per_second` and `tokenizer` do not."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)]
    pairs = set(zip(words, words[1:], strict=False))
    return bool(_SECRET_WORDS & set(words) or _SECRET_PAIRS & pairs or "apikey" in words)
