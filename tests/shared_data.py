"""Where the real clips lie that are not part of the repository."""

import os
from pathlib import Path

import pytest


def shared_folder() -> Path:
    """The folder that holds `real_data`: MOSS_TRAIN_SHARED, or `shared` beside the repository.

    The test is skipped, with a reason, where there is none; a folder that was named but holds nothing is a failure.
    """
    named = os.environ.get("MOSS_TRAIN_SHARED")
    path = Path(named) if named is not None else Path(__file__).resolve().parents[2] / "shared"
    if not (path / "real_data").is_dir():
        if named is not None:
            pytest.fail(f"MOSS_TRAIN_SHARED={named!r} holds no folder real_data")
        pytest.skip("no shared folder with real_data: set MOSS_TRAIN_SHARED")
    return path
