"""Tests of what only a GPU can run: collected everywhere, skipped with the reason where there is none."""

import sys
from pathlib import Path

import pytest
import torch

from moss_train.parallel import groups

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "model"))  # model_cases


def why_skipped() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]):
    reason = why_skipped()
    for item in items:
        if reason is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def parallel_state():
    yield groups.initialize()
    groups.shutdown()


@pytest.fixture(scope="session")
def te():
    return pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine (extra `gpu`)")


@pytest.fixture(scope="session")
def flash_attn():
    return pytest.importorskip("flash_attn", reason="needs flash-attn (extra `gpu`)")
