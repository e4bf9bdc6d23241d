"""When requests are meant to arrive: whole schedules, fixed from a seed before the run, in seconds of [0, duration).

An open loop sends by its schedule whatever the server does, so that a slow server meets a growing queue, as it would in
life. A soak is a long schedule, a sweep several with one seed.

The random ones are one renewal process, stretched. With gaps of mean 1 it comes at

    1.3, 1.9, 4.2, ...      arrivals of rate 1
    0.65, 0.95, 2.1, ...    of rate 2: the k-th comes when 2 t reaches it

and of a rate that changes, when the rate summed up to t reaches it. That inversion is exact: nothing is thinned out or
rounded to steps. With one seed, twice the rate is the same pattern in half the time, and a longer run begins with the
shorter one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tramontane.client.loadtest.load.durations import parse_duration
from tramontane.client.loadtest.load.streams import Stream, generator

MAX_ARRIVALS = 1_000_000
"""Of one schedule, on the mean: each becomes a request in memory."""

Float64Array = NDArray[np.float64]


def constant(rate: float, duration_s: float) -> tuple[float, ...]:
    """One arrival each 1 / rate seconds, the first at once: the only schedule that needs no seed.

    >>> constant(4, 1)
    (0.0, 0.25, 0.5, 0.75)
    """
    expected = _expected(_positive("rate", rate) * _positive("duration_s", duration_s))
    times = np.arange(math.ceil(expected) + 1) / rate
    return tuple(times[times < duration_s].tolist())


def poisson(rate: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Arrivals that know nothing of each other, as those of many independent users: `gamma` of burstiness 1."""
    return gamma(rate, 1.0, duration_s, seed)


def gamma(rate: float, burstiness: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Gaps of mean 1 / rate from a gamma distribution with shape `burstiness`, as in vLLM's benchmark.

    Their standard deviation is the mean / sqrt(burstiness): at rate 4 and 0.25 gaps of 0.25 s that spread by 0.5 s,
    bursts with silence between; at 100 they spread by 0.025 s, nearly a constant rate.
    """
    if not 0.001 <= burstiness <= 1_000_000:
        raise ValueError(f"burstiness is {burstiness:g}; it must lie in 0.001 .. 1,000,000")
    expected = _expected(_positive("rate", rate) * _positive("duration_s", duration_s))
    return _stretched(expected, burstiness, seed, duration_s, lambda unit: unit / rate)


def steps(levels: Sequence[tuple[float, float]], seed: int) -> tuple[float, ...]:
    """Poisson arrivals whose rate jumps: levels of (rate, seconds), one after the other.

    [(2, 10), (8, 5)] expects 20 arrivals in [0, 10) and 40 in [10, 15).
    """
    if not levels:
        raise ValueError("steps is empty; it must hold at least 1 level")
    starts_s, sums = [0.0], [0.0]
    for rate, seconds in levels:
        starts_s.append(starts_s[-1] + _positive("seconds", seconds))
        sums.append(sums[-1] + _positive("rate", rate) * seconds)
    # The sum of the rate is straight within a level, so interpolating its inverse is exact.
    return _stretched(_expected(sums[-1]), 1.0, seed, starts_s[-1], lambda unit: np.interp(unit, sums, starts_s))


def ramp(rate_from: float, rate_to: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Poisson arrivals whose rate goes from one to the other in a straight line.

    From 1 to 3 a second in 10 s: rates sum up to t + t² / 10, so 20 are expected; 7.5 of them in the first half.
    """
    first, last = _positive("rate_from", rate_from), _positive("rate_to", rate_to)
    expected = _expected((first + last) / 2 * _positive("duration_s", duration_s))
    slope = (last - first) / duration_s

    def when(unit: Float64Array) -> Float64Array:
        # Solves first t + slope t² / 2 = unit in the form that does not cancel where the slope is small or 0.
        root = np.sqrt(np.maximum(first * first + 2 * slope * unit, 0.0))
        return np.asarray(2 * unit / (first + root))

    return _stretched(expected, 1.0, seed, duration_s, when)


def parse_steps(text: str) -> tuple[tuple[float, float], ...]:
    """Levels for `steps`.

    >>> parse_steps("2:10s,8:1m")
    ((2.0, 10.0), (8.0, 60.0))
    """
    levels = []
    for level in text.split(","):
        rate, colon, seconds = level.partition(":")
        if not colon:
            raise ValueError(f"steps holds {level!r}; each level must be RATE:DURATION, such as 2:10s")
        levels.append((_positive("rate", _number("rate", rate)), parse_duration(seconds)))
    return tuple(levels)


def parse_ramp(text: str) -> tuple[float, float]:
    """The first and the last rate.

    >>> parse_ramp("1-8")
    (1.0, 8.0)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*-\s*([0-9.]+)\s*", text)
    if match is None:
        raise ValueError(f"ramp is {text!r}; it must be RATE-RATE, such as 1-8")
    first, last = (_positive("rate", _number("rate", rate)) for rate in match.groups())
    return first, last


def _stretched(
    expected: float, shape: float, seed: int, duration_s: float, when: Callable[[Float64Array], Float64Array]
) -> tuple[float, ...]:
    """The arrivals of rate 1 in [0, expected), each moved to where `when` puts it."""
    draw = generator(seed, Stream.ARRIVALS)
    gaps = draw.standard_gamma(shape, math.ceil(expected) + 16) / shape
    unit = np.cumsum(gaps)
    while unit[-1] < expected:  # the gaps were short: as many again
        gaps = np.concatenate([gaps, draw.standard_gamma(shape, len(gaps)) / shape])
        unit = np.cumsum(gaps)
    times = when(unit[unit < expected])
    return tuple(times[times < duration_s].tolist())


def _expected(arrivals: float) -> float:
    if not arrivals <= MAX_ARRIVALS:
        raise ValueError(f"rate x duration is {arrivals:,.0f} arrivals; it must be at most {MAX_ARRIVALS:,}")
    return arrivals


def _positive(field: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{field} is {value:g}; it must be above 0 and finite")
    return value


def _number(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{field} is {text.strip()!r}; it must be a number") from None
