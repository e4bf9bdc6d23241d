"""The sampler against the dumb one of `sampling.py`: by frequencies, and token by token from the same noise."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samplers import SAMPLERS
from sampling import dumb_distribution, dumb_draw, options, positions

from tramontane.stages.noise import uniform
from tramontane.stages.sampler import FIRST_RANKS


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request):
    return request.param()


SETTINGS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.3},
    "all": {"temperature": 1.3, "top_k": 7, "top_p": 0.85, "min_p": 0.1},
    "banned": {"top_k": 5, "banned": (0, 3)},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_follow_the_distribution(sampler, setting):
    """Chi-square over 40,000 positions of one seed; the noise is fixed, so the outcome is too."""
    draws = 40_000
    setting = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "banned": ()} | SETTINGS[setting]
    logits = np.array([1.0, -0.5, 0.3, 2.0, -1.5, 0.0, 0.8, 1.7, -0.2, 0.1, -3.0, 0.5], np.float32)
    expected, margin = dumb_distribution(logits, **setting)
    assert margin > 1e-4
    banned = [list(setting.pop("banned"))] * draws
    rows = options(draws, **setting, seed=11, banned=banned)
    token, _, finite = sampler.sample(torch.tensor(logits).expand(draws, -1), rows, positions(draws), len(logits))
    assert finite.all()
    counted = np.bincount(token, minlength=len(logits))
    assert (counted[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counted - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    freedom = possible.sum() - 1
    # Wilson and Hilferty: three standard deviations above the mean of chi-square.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3 * (2 / (9 * freedom)) ** 0.5) ** 3


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12), min_size=1, max_size=30),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.5, 5.0]),
    top_k=st.integers(0, 32),
    top_p=st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10_000),
    data=st.data(),
)
def test_every_token_is_the_dumb_ones(sampler, logits, temperature, top_k, top_p, min_p, seed, position, data):
    """Coarse logits, so that ties abound: the lower id must stay."""
    values = np.array(logits, np.float32) / 4
    banned = data.draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1))
    setting = {"temperature": temperature, "top_k": top_k, "top_p": float(np.float32(top_p)), "min_p": min_p}
    expected, margin = dumb_distribution(values, **setting, banned=banned)
    assume(margin > 1e-5)
    count = 50
    rows = options(count, **setting, seed=seed, banned=[sorted(banned)] * count)
    where = positions(count, position)
    token, log_probability, finite = sampler.sample(torch.tensor(values).expand(count, -1), rows, where, len(logits))
    assert finite.all()
    noise = uniform(rows.seed, where)
    for index in range(count):
        wanted = dumb_draw(expected, noise[index])
        assert wanted is None or token[index] == wanted
        assert expected[token[index]] > 0
    model, _ = dumb_distribution(values, 1.0, 0, 1.0, 0.0)
    np.testing.assert_allclose(log_probability, np.log(model[token]), atol=1e-5)


@pytest.mark.parametrize("width", [FIRST_RANKS - 1, FIRST_RANKS, FIRST_RANKS + 1, 5000])
def test_wide_sets_need_more_ranks_than_the_first(sampler, width):
    """Nuclei and top-k around and far beyond the ranks taken at first, with ties across the cut."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(1, 6000, generator=generator) * 8).round() / 8
    flat = logits[0].numpy()
    ranked = sorted(range(6000), key=lambda token: (-flat[token], token))
    probability = np.exp(flat.astype(np.float64) - flat.max())
    probability /= probability.sum()
    mass = probability[ranked].cumsum()
    middle = (mass[width - 2] + mass[width - 1]) / 2
    wanted = set(ranked[:width])
    count = 600
    for setting in ({"top_k": width}, {"top_p": middle}, {"top_k": width, "top_p": 0.9999999}):
        rows = options(count, temperature=1.0, seed=3, **setting)
        token, _, _ = sampler.sample(logits.expand(count, -1), rows, positions(count), 6000)
        assert set(token.tolist()) <= wanted
        expected = np.where(np.isin(np.arange(6000), ranked[:width]), probability, 0)
        noise = uniform(rows.seed, positions(count))
        for index in range(0, count, 6):
            found = dumb_draw(expected / expected.sum(), noise[index])
            assert found is None or found == token[index]
