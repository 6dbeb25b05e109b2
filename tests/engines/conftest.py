import pytest

from moss_train.parallel import groups


@pytest.fixture
def one_process():
    """Process groups of one process for the test, and none afterwards, so that later tests may fork."""
    groups.shutdown()
    yield groups.initialize()
    groups.shutdown()
