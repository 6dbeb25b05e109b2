"""What every test process needs before torch is imported, and the rule that golden tests never skip."""

import os
import sys
from pathlib import Path

# One thread each: the tensors are tiny, and several test processes may share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A golden test that skips would let a wrong model pass, so its skip is a failure."""
    report = yield
    if report.skipped and GOLDEN in item.path.parents and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped ({report.longrepr}); golden tests must run"
    return report


@pytest.fixture(autouse=True, scope="module")
def no_process_groups_left():
    """Each module of tests starts without process groups, so that it may fork ranks of its own."""
    yield
    groups = sys.modules.get("moss_train.parallel.groups")
    if groups is not None:
        groups.shutdown()
