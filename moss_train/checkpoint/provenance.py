"""What made a checkpoint: configuration, source revision, versions. Never a secret, never a machine's name."""

import platform
import re
import subprocess
from importlib import metadata
from typing import Any

from moss_train.locations import source_tree

PACKAGES = (
    "moss_train", "torch", "megatron-core", "safetensors", "numpy", "tokenizers", "webdataset", "decord", "av",
    "transformer-engine", "flash-attn", "deepspeed",
)  # fmt: skip

HIDDEN = "<hidden>"

#: Names that only secrets have. "token" alone would hide token counts and special tokens.
_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|credentials?)$|((api|access|auth|private|secret)_?key|"
    r"(^|(api|access|auth|hf|hub|wandb|bearer)_?)token)$",
    re.IGNORECASE,
)
#: Values that only secrets have: keys of well-known services, and user:password in an address.
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@"
)


def collect_provenance(config: dict[str, Any], tokenizer_fingerprint: str | None = None) -> dict[str, Any]:
    """JSON for `save_checkpoint`. config: the resolved configuration as plain containers; secrets are replaced."""
    return {
        "config": without_secrets(config),
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }


def git_revision() -> dict[str, Any] | None:
    """{"revision": commit, "modified": whether the tree differs from it}; None outside a source tree under git."""
    root = source_tree()
    if root is None:
        return None
    try:
        answers = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=30, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": answers[0].strip(), "modified": bool(answers[1].strip())}


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def without_secrets(value: Any) -> Any:
    """A copy of nested dicts and lists in which whatever looks like a secret is replaced by `HIDDEN`."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(inner, str) and _SECRET_NAME.search(str(key)) else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, str) and _SECRET_VALUE.search(value):
        return HIDDEN
    return value
