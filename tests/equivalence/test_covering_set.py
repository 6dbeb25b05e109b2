"""No layout changes a number: every legal pair of values of every option, against one plain process."""

import pytest
from covering import case_of, covering_set, legal_pairs, pairs_of

ROWS = covering_set()


def name_of(row) -> str:
    layout = "-".join(
        f"{axis}{row[axis]}" for axis in ("tp", "pp", "vpp", "cp", "dp", "zero") if row[axis] not in (0, 1)
    )
    return "-".join(filter(None, [layout, row["trainable"], row["streams"], row["precision"]]))


def test_every_legal_pair_occurs():
    covered = set().union(*(pairs_of(row) for row in ROWS))
    open_pairs = sorted(map(str, legal_pairs() - covered))
    assert not open_pairs, "choose the set anew (see covering.py)"


def test_every_row_is_legal():
    assert all(case_of(row) is not None for row in ROWS)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[name_of(row) for row in ROWS])
def test_a_layout_trains_as_one_process(comparer, number):
    case = case_of(ROWS[number])
    following = case_of(ROWS[number + 1]) if number + 1 < len(ROWS) else None
    comparison = comparer.compare(case, ahead=following and following.problem)
    assert comparison.ok, f"{case}\n" + "\n".join(comparison.failures)
