"""What every test process needs before torch is imported, and the rule that golden tests never skip."""

import gc
import os
import sys
from pathlib import Path

# One thread each: the tensors are tiny, and several test processes may share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
#: fewest tests in there
GOLDEN_TESTS = 19


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A golden test that skips would let a wrong model pass, so its skip is a failure."""
    report = yield
    return _never_skipped(item, report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same for a golden file that skips itself whole while it is collected."""
    report = yield
    return _never_skipped(collector, report)


def _never_skipped(node: pytest.Item | pytest.Collector, report):
    if report.skipped and GOLDEN in node.path.parents and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{node.nodeid} was skipped ({report.longrepr}); golden tests must run"
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """A run of all tests that finds fewer golden ones than there are has lost some."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if everything and config.option.markexpr == "not slow":
        found = sum(GOLDEN in item.path.parents for item in items)
        if found < GOLDEN_TESTS:
            raise pytest.UsageError(f"{found} golden tests found in {GOLDEN}, at least {GOLDEN_TESTS} must run")


def pytest_collection_finish() -> None:
    """What was imported stays, and need not be gone through whenever a test's process groups are collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_process_groups_left():
    """Each module of tests starts without process groups, so that it may fork ranks of its own."""
    yield
    groups = sys.modules.get("moss_train.parallel.groups")
    if groups is not None:
        groups.shutdown()
