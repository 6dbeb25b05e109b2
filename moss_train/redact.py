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
# Long enough that no path is mistaken for a key: what is hidden in a run's config.yaml is lost to whoever reads it.
_SERVICE_KEY = r"""
    (?<![A-Za-z0-9]) (?:                                                   # keys of services that show what they are
        sk-[\w-]{20,} | hf_[A-Za-z0-9]{20,} | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
        | xox[abpr]-[\w-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | ya29\.[\w-]{20,}
        | eyJ[\w-]{8,}\.[\w-]{8,}\.                                       # JSON web tokens
    )"""
_PRIVATE_KEY = r"-----BEGIN[ A-Z]*PRIVATE\ KEY"
_SECRET_VALUE = re.compile(f"{_SERVICE_KEY} | {_PRIVATE_KEY}", re.VERBOSE)
#: the same as far as the secret goes
_SECRET_WORD = re.compile(f"{_SERVICE_KEY} [^\\s'\"]* | {_PRIVATE_KEY} .*", re.VERBOSE | re.DOTALL)
_SPECIAL_TOKEN = re.compile(r"<[^<>]*>")  # `pad_token: <|pad|>` is a word of a vocabulary
# As far as the last @ before the path: a password may hold one.
_USER_IN_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^/\s]+@")
_PARAMETER_IN_ADDRESS = re.compile(r"(?P<name>[?&][\w.-]+=)[^&\s'\"]+")
#: parameters of an address that are secret beside those whose name says so
_SECRET_PARAMETERS = {
    "x-amz-signature",
    "x-amz-credential",
    "x-goog-signature",
    "x-goog-credential",
    "sig",
    "signature",
    "key",
    "auth",
    "pwd",
    "pass",
}


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
    return HIDDEN if _SECRET_VALUE.search(value) else _addresses_covered(value)


def covered(text: str) -> str:
    """A message as it may be printed: keys of known services, users, passwords and signatures in addresses are
    replaced by `[hidden]`, the rest stays readable."""
    return _addresses_covered(_SECRET_WORD.sub(HIDDEN, text))


def _addresses_covered(text: str) -> str:
    text = _USER_IN_ADDRESS.sub(lambda match: f"{match['scheme']}{HIDDEN}@", text)
    return _PARAMETER_IN_ADDRESS.sub(_covered_parameter, text)


def _covered_parameter(match: re.Match) -> str:
    name = match["name"][1:-1]
    secret = name.lower() in _SECRET_PARAMETERS or is_secret_key(name)
    return match["name"] + HIDDEN if secret else match[0]


def is_secret_key(key: str) -> bool:
    """Whether a setting of this name holds a secret: `hub_token` does, `tokens_per_second` and `tokenizer` do not."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)]
    pairs = set(zip(words, words[1:], strict=False))
    return bool(_SECRET_WORDS & set(words) or _SECRET_PAIRS & pairs or "apikey" in words)
