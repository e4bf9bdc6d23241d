"""Random numbers by name: what a run's seed decides, each part by a stream of its own.

Two parts that drew from one stream would shift each other: a rate of 8 instead of 4 would change the prompts too, and
two levels of a sweep could not be compared. So every part names its stream:

    generator(7, Stream.ARRIVALS)       # the same whatever the workload is
    generator(7, Stream.PROMPTS, 12)    # the text of prompt 12, the same in a plan of 13 requests and of 13,000

A seed gives the same numbers again with the same release of numpy, which keeps the right to improve its distributions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What is drawn. A number is never used twice, so that old seeds keep their meaning."""

    ARRIVALS = 1
    PROMPT_LENGTHS = 2
    COMPLETION_LENGTHS = 3
    PROMPTS = 4
    """By prompt."""
    PREFIXES = 5
    """By prefix."""
    ORDER = 6
    """Of the prompts of a file."""
    SEEDS = 7
    """Of requests."""
    CONDUCT = 8
    CANCEL = 9


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """The stream's generator, at its start.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, *numbers))))
