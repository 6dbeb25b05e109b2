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
_SECRET_VALUE = re.compile(
    r"""(?x)
    (?<![A-Za-z0-9]) (                                                     # keys of services that show what they are
        sk-[\w-]{20,} | hf_[A-Za-z0-9]{20,} | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
        | xox[abpr]-[\w-]{10,} | (AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | ya29\.[\w-]{20,}
        | eyJ[\w-]{8,}\.[\w-]{8,}\.                                       # JSON web tokens
    )
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
