"""The bisection alone, with made-up measurements."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.least import cheapest


def searched(
    meets: list[bool], walk: int = 2, met_above: bool = False
) -> tuple[int | None, list[int]]:
    """Return what was found among candidates 0, 1, 2, ..., and all that were asked, in order."""
    asked: list[int] = []

    def ask(number: int) -> bool:
        asked.append(number)
        return meets[number]

    return cheapest(range(len(meets)), ask, walk=walk, met_above=met_above), asked


@given(
    fail=st.integers(0, 200), meet=st.integers(0, 200), walk=st.integers(0, 4), above=st.booleans()
)
def test_a_monotone_condition_gives_the_very_first(
    fail: int, meet: int, walk: int, above: bool
) -> None:
    found, _ = searched([False] * fail + [True] * meet, walk, above)
    assert found == (fail if meet else None)


@given(meets=st.lists(st.booleans(), max_size=130), walk=st.integers(0, 4), above=st.booleans())
def test_any_condition_gives_the_cheapest_that_was_asked_and_met(
    meets: list[bool], walk: int, above: bool
) -> None:
    found, asked = searched(meets, walk, above)
    assert found == min((n for n in asked if meets[n]), default=None)
    assert len(asked) == len(set(asked))
    most = 1 + math.ceil(math.log2(len(meets))) + walk if meets else 0
    assert len(asked) <= most


def test_all_meet_and_none_meets() -> None:
    assert searched([True] * 128) == (0, [127, 63, 31, 15, 7, 3, 1, 0])
    assert searched([False] * 128) == (None, [127, 126, 125])
    assert searched([]) == (None, [])
    assert searched([True]) == (0, [0])


def test_beyond_the_border_the_next_cheaper_ones_are_asked() -> None:
    #        0      1     2      3      4     5     6     7
    meets = [False, True, False, False, True, True, True, True]
    assert searched(meets, walk=0) == (4, [7, 3, 5, 4])
    assert searched(meets, walk=1) == (4, [7, 3, 5, 4, 2])
    assert searched(meets, walk=2) == (1, [7, 3, 5, 4, 2, 1])


def test_where_the_dearest_fails_those_next_to_it_are_asked() -> None:
    assert searched([True, True, True, False]) == (1, [3, 2, 1])
    assert searched([True, False, False, False]) == (None, [3, 2, 1])


@pytest.mark.parametrize("last", [True, False])
def test_with_something_dearer_that_meets_the_dearest_is_not_asked_first(last: bool) -> None:
    meets = [False, False, True, last]
    found, asked = searched(meets, met_above=True)
    assert found == 2
    assert asked[0] == 1
