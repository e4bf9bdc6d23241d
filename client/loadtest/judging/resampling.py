"""How much a run's figures would vary if it were run again, told by resampling blocks of its time.

Requests that are near in time share the queue, the batch and the neighbour that was noisy, so they are no independent
samples. Blocks of a few seconds nearly are. A run is cut into 24 of them, and a rerun is imitated by drawing 24 of
these with replacement (Künsch 1989; blocks that do not overlap, as Carlstein 1986).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tramontane.client.loadtest.judging.quantiles import Floats

BLOCKS = 24
"""Enough to tell their scatter, few enough that a block of a minute's run outlasts most requests."""
RERUNS = 400
FINEST = 5000
"""More samples than this are told apart by rank only to one part in it."""

Draws = NDArray[np.int64]


def draws(random: np.random.Generator) -> Draws:
    """How often each rerun (row) takes each block (column): rows add up to the number of blocks."""
    return random.multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS), size=RERUNS)


def blocks_of(times_s: Sequence[float] | Floats, window_s: tuple[float, float]) -> NDArray[np.int64]:
    """The block in which each time lies: of a window of 48 s from 0, time 5 s lies in block 2."""
    start_s, end_s = window_s
    places = (np.asarray(times_s, dtype=np.float64) - start_s) * BLOCKS / (end_s - start_s)
    return np.clip(places.astype(np.int64), 0, BLOCKS - 1)


def rerun_sums(values: Sequence[float] | Floats, blocks: NDArray[np.int64], taken: Draws) -> Floats:
    """The sum of the values in each rerun."""
    amounts = np.bincount(blocks, weights=np.asarray(values, dtype=np.float64), minlength=BLOCKS)
    return taken.astype(np.float64) @ amounts


def rerun_quantiles(
    values: Sequence[float] | Floats, blocks: NDArray[np.int64], qs: Sequence[float], taken: Draws
) -> Floats:
    """The quantiles (columns) of the values in each rerun (rows)."""
    samples = np.asarray(values, dtype=np.float64)
    order = np.argsort(samples, kind="stable")
    bins = np.arange(len(samples)) * min(len(samples), FINEST) // len(samples)
    lasts = samples[order][np.searchsorted(bins, np.arange(bins[-1] + 1), side="right") - 1]
    counts = np.zeros((BLOCKS, len(lasts)))
    np.add.at(counts, (blocks[order], bins), 1)
    upto = np.cumsum(taken @ counts, axis=1)
    wanted = np.outer(upto[:, -1], qs)
    places = [
        [np.searchsorted(row, each - 1e-6) for each in targets] for row, targets in zip(upto, wanted, strict=True)
    ]
    return lasts[np.minimum(np.array(places), len(lasts) - 1)]
