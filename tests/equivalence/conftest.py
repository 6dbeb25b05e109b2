import pytest

from moss_train.bench.equivalence.comparing import Comparer


@pytest.fixture(scope="session")
def comparer():
    """Eight forked ranks that stay for all tests of this folder."""
    with Comparer() as ranks:
        yield ranks


@pytest.fixture
def ranks(comparer):
    return comparer.ranks
