"""Quantiles that say how well they are known.

A quantile here is a value that occurred: the smallest that at least a share q of the samples does not exceed. So "p95
below 1 s" and "95 % of the requests took less than 1 s" are one sentence.

Its confidence interval makes no assumption on the distribution's shape: how many of n samples fall below the true
quantile is a matter of coin tosses, so it lies between two samples whose ranks the binomial distribution tells. With
1,000 samples the p95 is sample 950, and the true one lies between samples 935 and 963 with 95 % confidence.

Gaps between messages are no independent tosses: a step that is slow is slow for the whole batch and for the next tokens
too. They come in groups, one per request, and count as fewer tosses, as the groups' disagreement shows (Korn and
Graubard 1998, on the interval of Woodruff 1952). It needs no resampling, so a million gaps take well below a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special  # `scipy.stats` would take a second to import

from tramontane.client.loadtest.result import CONFIDENCE, QUANTILES, Distribution, Quantile

Floats: TypeAlias = NDArray[np.float64]

LEAST_GROUPS_BEYOND = 5
"""Where the samples beyond a quantile come from fewer requests, they cannot tell how well it is known: no interval."""
LEAST_BEYOND = 10
"""A quantile with fewer samples beyond it is an anecdote, and left out: p99.9 needs 10,000 samples."""


def distribution(samples: Sequence[float] | Floats) -> Distribution | None:
    """Independent samples, such as one latency per request; None without samples."""
    return grouped_distribution([[sample] for sample in samples])


def grouped_distribution(groups: Sequence[Sequence[float]]) -> Distribution | None:
    """Samples that come in groups, such as one request's gaps, which resemble each other; None without samples."""
    sizes = [len(group) for group in groups if len(group)]
    if not sizes:
        return None
    samples = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups if len(group)])
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    owners = np.repeat(np.arange(len(sizes)), sizes)[order]
    return Distribution(
        count=len(ordered),
        mean=float(ordered.mean()),
        std=float(ordered.std()),
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        quantiles=tuple(_quantile(ordered, owners, q) for q in QUANTILES if beyond(len(ordered), q) >= LEAST_BEYOND),
    )


def rank(count: int, q: float) -> int:
    """The place of the quantile among sorted samples, from 0.

    >>> [rank(1000, q) for q in (0.5, 0.95, 0.999)]
    [499, 949, 998]
    """
    return min(max(math.ceil(round(q * count, 6)) - 1, 0), count - 1)


def beyond(count: int, q: float) -> int:
    """How many samples come after the quantile.

    >>> [beyond(1000, q) for q in (0.5, 0.99, 0.999)]
    [500, 10, 1]
    """
    return count - 1 - rank(count, q)


def quantile(samples: Sequence[float] | Floats, q: float) -> float:
    """One quantile of at least one sample, which may be infinite.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.0
    """
    place = rank(len(samples), q)
    return float(np.partition(np.asarray(samples, dtype=np.float64), place)[place])


def _quantile(ordered: Floats, owners: NDArray[np.int64], q: float) -> Quantile:
    """A quantile of sorted samples, whose groups are told by `owners`."""
    count = len(ordered)
    value = ordered[rank(count, q)]
    if len(np.unique(owners[rank(count, q) + 1 :])) < LEAST_GROUPS_BEYOND:
        return Quantile(q=q, value=float(value), low=None, high=None)
    tosses = _independent_count(ordered <= value, owners)
    tail = (1 - CONFIDENCE) / 2
    low = special.betaincinv(q * tosses, (1 - q) * tosses + 1, tail)
    high = special.betaincinv(q * tosses + 1, (1 - q) * tosses, 1 - tail)
    known = beyond(count, high) > 0
    return Quantile(
        q=q,
        value=float(value),
        low=float(ordered[rank(count, low)]),
        high=float(ordered[rank(count, high)]) if known else None,
    )


def _independent_count(below: NDArray[np.bool_], owners: NDArray[np.int64]) -> float:
    """To how many independent samples these amount in telling the share that is below.

    Ten groups of 100, of which five are all below and five all above, say no more than ten samples do.
    """
    groups = int(owners.max()) + 1
    count = len(below)
    if groups == count:
        return count
    share = below.mean()
    surplus = np.bincount(owners, weights=below - share)
    variance = (surplus**2).sum() / count**2 * groups / (groups - 1)
    if variance == 0:
        return count
    upper = (1 + CONFIDENCE) / 2
    few_groups = (special.ndtri(upper) / special.stdtrit(groups - 1, upper)) ** 2
    return float(min(share * (1 - share) / variance * few_groups, count))
