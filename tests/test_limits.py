"""Limits on how far a metric may drop or rise from what the unquantized network has."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import InvalidInputError
from mpq.core.limits import Limit


@pytest.mark.parametrize(
    ("text", "base", "just", "not_quite"),
    [
        ("accuracy drop <= 1%", 0.97, 0.9603, 0.96029),  # relative to the value
        ("accuracy drop <= 0.01", 0.97, 0.96, 0.95999),  # in the metric's own unit
        ("accuracy drop <= 0", 0.97, 0.97, 0.96999),
        ("perplexity rise <= 5%", 20.0, 21.0, 21.001),
        ("perplexity rise<=.5", 20.0, 20.5, 20.501),
        ("log likelihood drop <= 10%", -2.0, -2.2, -2.2001),  # of the size of a negative value
        ("loss rise <= 10 %", -2.0, -1.8, -1.7999),
        ("drop drop <= 1", 3.0, 2.0, 1.9999),
    ],
)
def test_a_change_is_limited_relative_to_the_base(
    text: str, base: float, just: float, not_quite: float
) -> None:
    limit = Limit.parse(text).from_base(base)
    assert limit.met(base)
    assert limit.met(just)
    assert not limit.met(not_quite)
    assert not limit.met(math.nan)
    assert limit.nearest([just, base, not_quite, math.nan]) == base


@given(
    metric=st.sampled_from(["accuracy", "top 1", "a%b"]),
    change=st.sampled_from(["", "drop", "rise"]),
    bound=st.floats(0, 1e6),
    percent=st.booleans(),
    base=st.floats(-1e6, 1e6).filter(bool),
)
def test_a_text_is_read_back(
    metric: str, change: str, bound: float, percent: bool, base: float
) -> None:
    limit = Limit(metric, "<=", bound)
    if change:
        limit = Limit(metric, "<=", bound, change, percent, base)  # type: ignore[arg-type]
    assert Limit.parse(limit.text) == limit
    assert limit.from_base(7.0) == limit


def test_what_is_lost_exactly_as_allowed_meets_the_limit() -> None:
    for right in range(1, 1000):
        limit = Limit.parse("accuracy drop <= 0.001").from_base(right / 1000)
        assert limit.met((right - 1) / 1000)
        assert not limit.met((right - 2) / 1000)


def test_a_message_says_what_was_asked_and_of_what() -> None:
    limit = Limit.parse("accuracy drop <= 1%").from_base(0.9694019471488178)
    assert str(limit) == "accuracy drop <= 1% from 0.969402"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("accuracy drop >= 1%", r"a drop is limited from above, write .*'accuracy drop <= 1%'"),
        ("accuracy drop <= -1%", "a drop is limited from above"),
        ("accuracy <= 1%", "cannot read limit"),
        ("accuracy <= 1 from 2", "cannot read limit"),
        ("accuracy drop <= 1 %%", "cannot read limit"),
        ("accuracy drop <= 1% from x", "cannot read limit"),
    ],
)
def test_what_is_no_limit_on_a_change_is_one_line(text: str, line: str) -> None:
    with pytest.raises(InvalidInputError, match=line) as caught:
        Limit.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "base"), [("a drop <= 1%", 0.0), ("a rise <= 1", math.nan)])
def test_nothing_is_relative_to_zero_or_nan(text: str, base: float) -> None:
    with pytest.raises(InvalidInputError, match=r"has a (0|nan), nothing is relative to that"):
        Limit.parse(text).from_base(base)


def test_a_drop_from_zero_in_the_metric_s_own_unit_is_fine() -> None:
    assert Limit.parse("a drop <= 1").from_base(0.0).met(-1.0)


def test_a_change_without_its_base_is_never_met_in_silence() -> None:
    with pytest.raises(ValueError, match="has no base yet"):
        Limit.parse("a drop <= 1%").met(1.0)
