"""Which rates a sweep tries, with plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.client.loadtest.search import Search


def tried(search: Search, limit: float) -> list[float]:
    rates = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        search.learn(rate, holds=rate <= limit)
    return rates


def test_the_example():
    search = Search(lowest=1, highest=1024, tolerance=0.1)
    assert [round(rate, 2) for rate in tried(search, limit=5)] == [1, 2, 4, 8, 5.66, 4.76, 5.19]
    assert round(search.held, 2) == 4.76


def test_no_rate_holds():
    search = Search(lowest=2, highest=8, tolerance=0.1)
    assert tried(search, limit=1) == [2]
    assert (search.held, search.missed) == (None, 2)


def test_every_rate_holds():
    search = Search(lowest=2, highest=7, tolerance=0.1)
    assert tried(search, limit=100) == [2, 4, 7]
    assert (search.held, search.missed) == (7, None)


@given(
    lowest=st.floats(0.01, 10),
    factor=st.floats(1, 1e4),
    limit=st.floats(0.001, 1e6),
    tolerance=st.floats(0.005, 0.5),
)
def test_the_answer_is_within_the_tolerance(lowest, factor, limit, tolerance):
    search = Search(lowest=lowest, highest=lowest * factor, tolerance=tolerance)
    rates = tried(search, limit)
    assert len(rates) == len(set(rates)) <= 40
    if limit < lowest:
        assert search.held is None
    elif limit >= search.highest:
        assert search.held == pytest.approx(search.highest)
    else:
        assert search.held <= limit < search.held * (1 + tolerance) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lowest": 0}, "rates are 0 .. 8"),
        ({"lowest": 9}, "rates are 9 .. 8"),
        ({"highest": float("inf")}, "rates are 1 .. inf"),
        ({"tolerance": 0}, "tolerance is 0"),
    ],
)
def test_limits(fields, says):
    with pytest.raises(ValueError, match=says):
        Search(**{"lowest": 1, "highest": 8, "tolerance": 0.1} | fields)
