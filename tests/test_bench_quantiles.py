"""Quantiles against numpy, and whether their intervals hold as often as they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.client.loadtest.judging.quantiles import distribution, grouped_distribution, quantile
from tramontane.client.loadtest.result import QUANTILES


@given(samples=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200), q=st.sampled_from(QUANTILES))
def test_quantile_is_numpys_inverted_cdf(samples, q):
    assert quantile(samples, q) == np.quantile(samples, q, method="inverted_cdf")


def test_a_thousand_samples():
    found = distribution(np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)))
    assert (found.count, found.mean, found.minimum, found.maximum) == (1000, 500.5, 1, 1000)
    assert found.std == pytest.approx(288.675, abs=0.001)
    assert [(each.q, each.value) for each in found.quantiles] == [
        (0.5, 500),
        (0.75, 750),
        (0.9, 900),
        (0.95, 950),
        (0.99, 990),
    ]
    p95 = found.quantiles[3]
    assert (p95.low, p95.high) == (935, 963)
    assert found.at(0.999) is None


@pytest.mark.parametrize(("count", "printed"), [(19, ()), (20, (0.5,)), (199, QUANTILES[:3]), (10_000, QUANTILES)])
def test_ten_samples_lie_beyond_what_is_printed(count, printed):
    assert tuple(each.q for each in distribution(np.arange(count)).quantiles) == printed


def test_no_samples_no_distribution():
    assert distribution([]) is grouped_distribution([(), ()]) is None


def test_equal_samples_have_a_sure_quantile():
    (median, *_) = distribution([7.0] * 100).quantiles
    assert (median.value, median.low, median.high) == (7, 7, 7)


def coverage(draw, q, truth, runs=300):
    """How often the interval holds the truth."""
    held = 0
    for _ in range(runs):
        (found,) = (each for each in draw().quantiles if each.q == q)
        held += found.low <= truth and (found.high is None or truth <= found.high)
    return held / runs


@pytest.mark.parametrize(("count", "q"), [(20, 0.5), (200, 0.95), (1000, 0.99)])
def test_intervals_of_independent_samples_hold_95_times_of_100(count, q):
    random = np.random.default_rng(1)
    assert coverage(lambda: distribution(random.exponential(1, count)), q, -np.log(1 - q)) >= 0.93


@pytest.mark.parametrize(("requests", "q"), [(20, 0.5), (100, 0.5), (100, 0.95)])
def test_intervals_of_gaps_hold_although_a_request_is_slow_as_a_whole(requests, q):
    """Each request has its own speed. With about five requests in the tail it is 91 to 94 times of 100; gaps taken for
    independent would hold some 30.
    """
    random = np.random.default_rng(2)

    def gaps(count):
        return random.exponential(1, (count, 1)) + random.exponential(0.3, (count, 20))

    truth = np.quantile(gaps(100_000), q)
    assert coverage(lambda: grouped_distribution(list(gaps(requests))), q, truth) >= 0.9
    assert coverage(lambda: distribution(gaps(requests).ravel()), q, truth) < 0.6


def test_a_tail_of_one_request_has_no_interval():
    groups = [[1.0] * 50] * 99 + [[100.0] * 50]
    p99 = grouped_distribution(groups).quantiles[-1]
    assert (p99.q, p99.low, p99.high) == (0.99, None, None)
