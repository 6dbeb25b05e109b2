"""What made a checkpoint: configuration, source revision, versions. Never a secret, never a machine's name."""

import platform
import subprocess
from importlib import metadata
from typing import Any

from moss_train.locations import source_tree
from moss_train.redact import redact

PACKAGES = (
    "moss_train", "torch", "megatron-core", "safetensors", "numpy", "tokenizers", "webdataset", "decord", "av",
    "transformer-engine", "flash-attn", "deepspeed",
)  # fmt: skip


def collect_provenance(config: dict[str, Any], tokenizer_fingerprint: str | None = None) -> dict[str, Any]:
    """JSON for `save_checkpoint`. config: the resolved configuration as plain containers; secrets are replaced."""
    return {
        "config": redact(config),
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
