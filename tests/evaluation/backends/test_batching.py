import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.evaluation.backends.batching import shared_prefixes

rows = st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=12)


def saved(groups, overhead):
    return sum((len(group.members) - 1) * group.length - overhead for group in groups)


@given(rows, st.integers(0, 8))
def test_members_share_their_prefix_and_no_row_is_in_two_groups(rows, overhead):
    groups = shared_prefixes(rows, overhead)
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len({tuple(rows[member][: group.length]) for member in group.members}) == 1
        assert all(len(rows[member]) >= group.length for member in group.members)
        assert saved([group], overhead) > 0


@given(rows, st.integers(0, 8))
def test_no_single_group_saves_more(rows, overhead):
    found = saved(shared_prefixes(rows, overhead), overhead)
    for prefix in (row[:length] for row in rows for length in range(len(row) + 1)):
        alike = sum(row[: len(prefix)] == prefix for row in rows)
        assert found >= (alike - 1) * len(prefix) - overhead


def test_groups_by_hand():
    shots, context = [1] * 100, [2] * 50
    rows = [[*shots, 7], [*shots, *context, 8], [*shots, *context, 9], [3, 4], [*shots, 5]]
    assert shared_prefixes(rows, 40) == [(100, [0, 1, 2, 4])]
    rows = [[*shots, 7], *([*shots, *context, number] for number in range(9)), [3, 4]]
    assert shared_prefixes(rows, 40) == [(150, list(range(1, 10)))]


@pytest.mark.parametrize("rows", [[], [[1, 2]], [[], []]])
def test_nothing_to_share(rows):
    assert shared_prefixes(rows, 0) == []


def test_many_nested_rows():
    """A thousand levels: each row begins with the one before."""
    assert saved(shared_prefixes([[1] * n for n in range(1000)], 0), 0) == 500 * 499
