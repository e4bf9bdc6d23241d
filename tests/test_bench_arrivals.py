"""Schedules: the right number at the right times, the same again from a seed."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load import arrivals
from tramontane.client.loadtest.load.durations import parse_duration

seeds = st.integers(0, 2**64)
rates = st.floats(0.05, 50)
durations = st.floats(0.1, 60)
levels = st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.5, 20)), min_size=1, max_size=4)


def gaps(times):
    return [after - before for before, after in pairwise((0.0, *times))]


def check_schedule(times, duration_s):
    assert list(times) == sorted(times)
    assert all(0 <= at < duration_s for at in times)
    assert all(type(at) is float for at in times)


def test_a_constant_rate_is_evenly_spaced():
    assert arrivals.constant(2, 2.5) == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert arrivals.constant(3, 1) == (0.0, 1 / 3, 2 / 3)
    assert arrivals.constant(0.1, 5) == (0.0,)
    assert len(arrivals.constant(1000, 1000)) == arrivals.MAX_ARRIVALS


@settings(deadline=None)
@given(rates, durations)
def test_a_constant_rate_never_leaves_its_duration(rate, duration_s):
    times = arrivals.constant(rate, duration_s)
    check_schedule(times, duration_s)
    assert abs(len(times) - rate * duration_s) <= 1


@settings(deadline=None)
@given(rates, st.floats(0.05, 100), durations, seeds)
def test_random_schedules_are_sorted_and_within(rate, burstiness, duration_s, seed):
    times = arrivals.gamma(rate, burstiness, duration_s, seed)
    check_schedule(times, duration_s)
    assert times == arrivals.gamma(rate, burstiness, duration_s, seed)


@settings(deadline=None)
@given(levels, seeds)
def test_steps_are_sorted_and_within(steps, seed):
    check_schedule(arrivals.steps(steps, seed), sum(seconds for _, seconds in steps))


@settings(deadline=None)
@given(rates, rates, durations, seeds)
def test_ramps_are_sorted_and_within(rate_from, rate_to, duration_s, seed):
    check_schedule(arrivals.ramp(rate_from, rate_to, duration_s, seed), duration_s)


@pytest.mark.parametrize("seed", range(20))
def test_poisson_counts_are_poisson(seed):
    # 4,000 arrivals expected, with a standard deviation of 63: five of them are missed once in 1.7 million.
    assert abs(len(arrivals.poisson(40, 100, seed)) - 4000) < 5 * sqrt(4000)


def test_poisson_counts_spread_as_they_should():
    counts = [len(arrivals.poisson(10, 10, seed)) for seed in range(400)]
    assert abs(fmean(counts) - 100) < 5 * 10 / sqrt(400)
    # Of 400 normal counts the sample's variance spreads by sqrt(2 / 399) = 7 %.
    assert abs(stdev(counts) ** 2 / 100 - 1) < 5 * 0.071


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, 100.0])
def test_gammas_gaps_have_the_mean_and_spread_of_their_shape(burstiness):
    between = gaps(arrivals.gamma(20, burstiness, 2000, seed=3))
    variation = 1 / sqrt(burstiness)
    assert abs(fmean(between) * 20 - 1) < 5 * variation / sqrt(len(between))
    # The variance of a gamma sample's variance, relative, is (2 + 6 / shape) / n; half of it for the deviation.
    assert (
        abs(stdev(between) / fmean(between) / variation - 1) < 5 * sqrt((2 + 6 / burstiness) / len(between)) / 2 + 0.01
    )


def test_steps_change_the_rate():
    times = arrivals.steps([(10, 100), (40, 50), (5, 200)], seed=1)
    counts = [sum(start <= at < end for at in times) for start, end in ((0, 100), (100, 150), (150, 350))]
    for count, expected in zip(counts, (1000, 2000, 1000), strict=True):
        assert abs(count - expected) < 5 * sqrt(expected)


def test_one_step_is_poisson():
    assert arrivals.steps([(7, 30)], seed=4) == pytest.approx(arrivals.poisson(7, 30, seed=4), abs=1e-9)
    assert arrivals.ramp(7, 7, 30, seed=4) == pytest.approx(arrivals.poisson(7, 30, seed=4), abs=1e-9)


@pytest.mark.parametrize(("rate_from", "rate_to", "halves"), [(100, 300, (750, 1250)), (300, 100, (1250, 750))])
def test_a_ramp_is_dense_where_its_rate_is_high(rate_from, rate_to, halves):
    times = arrivals.ramp(rate_from, rate_to, 10, seed=2)
    first = sum(at < 5 for at in times)
    for count, expected in zip((first, len(times) - first), halves, strict=True):
        assert abs(count - expected) < 5 * sqrt(expected)


def test_a_ramp_inverts_its_summed_rate():
    """Two roads: where the ramp put each arrival, rates sum up to the arrival of rate 1 that it came from."""
    unit = arrivals.poisson(1, 20, seed=6)
    times = arrivals.ramp(1, 3, 10, seed=6)
    assert [at + at**2 / 10 for at in times] == pytest.approx(list(unit))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([0.05, 0.3, 1.0, 5.0]), st.floats(0.5, 20), st.floats(1, 4), seeds)
def test_a_longer_run_begins_with_the_shorter(burstiness, duration_s, factor, seed):
    longer = arrivals.gamma(3, burstiness, duration_s * factor, seed)
    assert arrivals.gamma(3, burstiness, duration_s, seed) == tuple(at for at in longer if at < duration_s)


def test_twice_the_rate_is_the_same_pattern_in_half_the_time():
    slow = arrivals.poisson(4, 60, seed=9)
    assert [2 * at for at in arrivals.poisson(8, 30, seed=9)] == pytest.approx(list(slow))


def test_seeds_differ():
    assert arrivals.poisson(4, 60, seed=1) != arrivals.poisson(4, 60, seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arrivals.constant(0, 1), "rate is 0; it must be above 0"),
        (lambda: arrivals.constant(float("nan"), 1), "rate is nan"),
        (lambda: arrivals.poisson(-1, 1, 0), "rate is -1"),
        (lambda: arrivals.poisson(float("inf"), 1, 0), "rate is inf"),
        (lambda: arrivals.poisson(1, 0, 0), "duration_s is 0"),
        (lambda: arrivals.poisson(1, float("nan"), 0), "duration_s is nan"),
        (lambda: arrivals.poisson(1, 1, -1), "seed is -1; it must be at least 0"),
        (lambda: arrivals.gamma(1, 0, 1, 0), "burstiness is 0; it must lie in 0.001"),
        (lambda: arrivals.gamma(1, float("nan"), 1, 0), "burstiness is nan"),
        (lambda: arrivals.constant(2000, 1000), "2,000,000 arrivals; it must be at most 1,000,000"),
        (lambda: arrivals.poisson(1e300, 1e300, 0), "inf arrivals; it must be at most 1,000,000"),
        (lambda: arrivals.steps([], 0), "steps is empty"),
        (lambda: arrivals.steps([(1, 10), (0, 10)], 0), "rate is 0"),
        (lambda: arrivals.steps([(1, -10)], 0), "seconds is -10"),
        (lambda: arrivals.ramp(1, 0, 10, 0), "rate_to is 0"),
        (lambda: arrivals.ramp(1, 1e9, 10, 0), "at most 1,000,000"),
        (lambda: parse_duration("soon"), "duration is 'soon'"),
        (lambda: parse_duration("0s"), "duration is 0; it must be above 0"),
        (lambda: parse_duration("1.2.3s"), "duration is '1.2.3'; it must be a number"),
        (lambda: parse_duration("-5s"), "duration is '-5s'"),
        (lambda: parse_duration("9" * 400), "duration is inf"),
        (lambda: arrivals.parse_steps("2:10s,4"), "steps holds '4'; each level must be RATE:DURATION"),
        (lambda: arrivals.parse_steps(""), "steps holds ''"),
        (lambda: arrivals.parse_steps("x:10s"), "rate is 'x'; it must be a number"),
        (lambda: arrivals.parse_steps("nan:10s"), "rate is nan"),
        (lambda: arrivals.parse_ramp("1"), "ramp is '1'; it must be RATE-RATE"),
        (lambda: arrivals.parse_ramp("0-8"), "rate is 0"),
    ],
)
def test_what_makes_no_schedule_is_refused(call, message):
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert message in str(caught.value)


def test_text_forms():
    assert parse_duration(" 2m ") == 120
    assert arrivals.parse_steps("2:10, 0.5:1m") == ((2, 10), (0.5, 60))
    assert arrivals.parse_ramp("0.5 - 8") == (0.5, 8)
