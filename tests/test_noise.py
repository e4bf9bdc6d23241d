"""The sampler's noise: a published hash of seed and position, even along both."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sampling import positions

from tramontane.stages.noise import random_bits, uniform


def test_noise_is_splitmix64():
    """Seed 0 is the published sequence (the test vector of Java's SplittableRandom and of Vigna's splitmix64.c)."""
    bits = random_bits(np.zeros(5, np.uint64), positions(5))
    assert [int(value) for value in bits] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
        0x1B39896A51A8749B,
    ]


def mixed(z):
    """SplitMix64's finaliser on Python's whole numbers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31 - 1))
def test_noise_is_the_same_hash_in_plain_integers(seed, position):
    wanted = mixed((mixed(seed) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11
    found = uniform(np.array([seed], np.uint64), np.array([position], np.int32))
    assert found.dtype == np.float64
    assert found[0] == wanted / 2**53
    assert 0 <= found[0] < 1


def test_noise_is_even_over_positions_and_over_seeds():
    count = 64_000
    along_positions = uniform(np.full(count, 42, np.uint64), positions(count))
    along_seeds = uniform(np.arange(count, dtype=np.uint64), np.full(count, 3, np.int32))
    for noise in (along_positions, along_seeds):
        counted = np.bincount((noise * 64).astype(int), minlength=64)
        assert ((counted - 1000) ** 2 / 1000).sum() < 64 + 3 * (2 * 64) ** 0.5
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 3 / count**0.5
    assert abs(np.corrcoef(along_positions, along_seeds)[0, 1]) < 3 / count**0.5
