"""Sampling noise as a pure function of (seed, position), so that a replayed request draws the same tokens anywhere.

The generator is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; its
mixing function is variant 13 of David Stafford's), used as a counter-based hash: the seed, mixed once, is the state,
and position p is the generator's output number p. Integer arithmetic modulo 2^64 only: the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tramontane.stages.microbatch import Int32Array, UInt64Array

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: UInt64Array) -> UInt64Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed: UInt64Array, position: Int32Array) -> UInt64Array:
    """64 even bits for each (seed, position); positions count from 0.

    >>> [hex(bits) for bits in random_bits(np.zeros(2, np.uint64), np.array([0, 1], np.int32))]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    return _mix(_mix(seed) + (position.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def uniform(seed: UInt64Array, position: Int32Array) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): a multiple of 2^-53."""
    return (random_bits(seed, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53
