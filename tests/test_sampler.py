"""The sampler, row by row: ties, extremes, banned and spare ids, rows that fail alone, bits in any company, scores."""

import numpy as np
import pytest
import torch
from samplers import SAMPLERS
from sampling import alone, options, positions

from tramontane.stages.noise import uniform


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request):
    return request.param()


def test_ties_go_to_the_lower_id(sampler):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 3.0, 1.0]])
    token, _, _ = sampler.sample(logits, options(1, temperature=0.0), positions(1), 6)
    assert token.tolist() == [1]
    many = logits.expand(500, -1)
    for setting, kept in (({"top_k": 2}, {1, 3}), ({"top_k": 4}, {1, 2, 3, 4}), ({"top_p": 0.4}, {1, 3})):
        token, _, _ = sampler.sample(many, options(500, seed=5, **setting), positions(500), 6)
        assert set(token.tolist()) == kept


@pytest.mark.parametrize("ids", [5, 64, 1000, 32_001])
def test_greedy_takes_the_first_of_equal_maxima(sampler, ids):
    """`max` is documented to give the first index; on rows long enough for vector code too."""
    logits = torch.zeros(3, ids)
    logits[0, ids // 2 :] = 1.0
    logits[1, [ids // 3, ids - 1]] = 2.0
    token, _, _ = sampler.sample(logits, options(3, temperature=0.0), positions(3), ids)
    assert token.tolist() == [ids // 2, ids // 3, 0]


def test_greedy_ignores_filters_and_noise(sampler):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    rows = options(50, temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, seed=np.arange(50))
    token, log_probability, _ = sampler.sample(logits, rows, positions(50), 40)
    assert token.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(log_probability), logits.log_softmax(-1).max(-1).values)


def test_neutral_filters_change_nothing(sampler):
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(3))
    plain = sampler.sample(logits, options(200, seed=7), positions(200), 300)
    for neutral in ({"top_k": 300}, {"top_k": 10**6}, {"min_p": 1e-30}, {"top_p": 0.99999999}):
        assert (
            sampler.sample(logits, options(200, seed=7, **neutral), positions(200), 300)[0].tolist()
            == plain[0].tolist()
        )


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3, 1e30, 3e38])
def test_extreme_temperatures_stay_finite(sampler, temperature):
    logits = torch.tensor([[1.0, 2.0, -4.0, 2.0 - 1e-2]]).expand(4000, -1)
    token, _, finite = sampler.sample(logits, options(4000, temperature=temperature, seed=1), positions(4000), 4)
    assert finite.all()
    counted = np.bincount(token, minlength=4) / 4000
    if temperature < 1:
        assert counted.tolist() == pytest.approx([0, 1, 0, 0], abs=0.01)
    else:
        assert counted.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_running_sums_do_not_drift_over_a_wide_vocabulary(sampler):
    """Flat logits: the token is the noise scaled by the number of ids."""
    ids, count = 30_000, 200
    noise = uniform(np.full(count, 6, np.uint64), positions(count))
    token, _, _ = sampler.sample(torch.zeros(count, ids), options(count, seed=6), positions(count), ids)
    clear = np.abs(noise * ids - np.round(noise * ids)) > 0.01
    assert token[clear].tolist() == np.floor(noise * ids)[clear].tolist()


def test_a_tail_beyond_the_resolution_of_float32_can_be_drawn(sampler):
    """An id of probability 2e-8 after one of nearly 1, and a seed (found by search) whose noise is within 4e-9 of 1."""
    seed = 95_449_713
    assert 1 - 4e-9 < uniform(np.array([seed], np.uint64), positions(1))[0] < 1
    token, _, _ = sampler.sample(torch.tensor([[0.0, np.log(2e-8)]]), options(1, seed=seed), positions(1), 2)
    assert token.tolist() == [1]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_spare_rows_of_the_head_are_never_sampled_and_keep_their_probability(sampler, filters):
    """Filters see the other ids only, however likely the spare ones are; the model's softmax sees all."""
    logits = torch.randn(400, 20, generator=torch.Generator().manual_seed(4))
    logits[:, 15:] = 9.0
    rows = options(400, temperature=np.arange(400) % 2 * 0.7, seed=9, **filters)
    token, log_probability, finite = sampler.sample(logits, rows, positions(400), 15)
    assert finite.all()
    narrow = sampler.sample(logits[:, :15].contiguous(), rows, positions(400), 15)
    assert token.tolist() == narrow[0].tolist()
    model = logits.double().log_softmax(-1).gather(1, torch.tensor(token).long()[:, None])[:, 0]
    np.testing.assert_allclose(log_probability, model.numpy(), rtol=1e-6, atol=1e-6)


def test_a_spare_row_that_is_not_finite_leaves_no_softmax(sampler):
    logits = torch.zeros(3, 20)
    logits[0, 16], logits[2, 19] = torch.nan, torch.inf
    assert sampler.sample(logits, options(3), positions(3), 15)[2].tolist() == [False, True, False]


def test_banned_ids_are_never_sampled_and_keep_their_probability(sampler):
    logits = torch.tensor([[5.0, 1.0, 0.0, -1.0]]).expand(600, -1)
    banned = [[0], [0, 1], [0, 1, 2, 99]] * 200
    temperature = np.arange(600) // 3 % 2
    token, log_probability, finite = sampler.sample(
        logits, options(600, temperature=temperature, seed=2, banned=banned), positions(600), 4
    )
    assert finite.all()
    assert all(chosen not in ids for chosen, ids in zip(token.tolist(), banned, strict=True))
    assert set(token[0::3].tolist()) == {1, 2, 3}
    model = torch.log_softmax(logits[0], -1)
    np.testing.assert_allclose(log_probability, model[torch.tensor(token).long()].numpy(), atol=1e-6)


def test_a_row_with_every_id_banned_fails_alone(sampler):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    rows = options(3, temperature=[1.0, 1.0, 0.0], top_k=[2, 2, 0], banned=[[], [0, 1, 2, 3], [0, 1, 2, 3]])
    token, log_probability, finite = sampler.sample(logits, rows, positions(3), 4)
    assert finite.tolist() == [True, False, False]
    assert token[1:].tolist() == log_probability[1:].tolist() == [0, 0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_fails_alone(sampler, poison):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(8, 50, generator=generator)
    rows = options(8, temperature=[0, 1] * 4, top_k=[0, 3, 0, 0] * 2, top_p=[1, 1, 1, 0.8] * 2, seed=np.arange(8))
    clean = sampler.sample(logits, rows, positions(8), 50)
    for row in range(8):
        spoiled = logits.clone()
        spoiled[row, 17] = poison
        token, log_probability, finite = sampler.sample(spoiled, rows, positions(8), 50)
        assert finite.tolist() == [other != row for other in range(8)]
        assert (token[row], log_probability[row]) == (0, 0)
        others = np.arange(8) != row
        assert token[others].tolist() == clean[0][others].tolist()
        assert log_probability[others].tobytes() == clean[1][others].tobytes()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ids", [7, 99, 1000, 33_000])
def test_a_row_alone_gives_the_bits_that_it_gives_in_company(sampler, ids, threads):
    """Every kind of row in one batch; 33,000 ids are past the size at which torch cuts one row among its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count = 24
        generator = torch.Generator().manual_seed(ids)
        logits = torch.randn(count, ids + 3, generator=generator) * 3
        kinds = np.arange(count)
        rows = options(
            count,
            temperature=(kinds % 5) * 0.4,
            top_k=np.where(kinds % 3 == 0, 5, 0),
            top_p=np.where(kinds % 4 == 1, 0.8, 1.0),
            min_p=np.where(kinds % 6 == 2, 0.1, 0.0),
            seed=kinds * 12345,
            banned=[[index % ids] if index % 2 else [] for index in range(count)],
        )
        where = positions(count, 77)
        together = sampler.sample(logits, rows, where, ids)
        scored = sampler.score(logits, np.arange(count, dtype=np.int32) % ids)
        for index in range(count):
            single = sampler.sample(logits[index : index + 1], alone(rows, index), where[index : index + 1], ids)
            assert [part[0].tobytes() for part in single] == [part[index].tobytes() for part in together]
            one = sampler.score(logits[index : index + 1], np.array([index % ids], np.int32))
            assert one[0].tobytes() == scored[index].tobytes()
        order = torch.randperm(count, generator=generator).numpy()
        shuffled = options(
            count,
            temperature=rows.temperature[order],
            top_k=rows.top_k[order],
            top_p=rows.top_p[order],
            min_p=rows.min_p[order],
            seed=rows.seed[order],
            banned=[[index % ids] if index % 2 else [] for index in order.tolist()],
        )
        moved = sampler.sample(logits[torch.tensor(order)], shuffled, where[order], ids)
        assert [part.tobytes() for part in moved] == [part[order].tobytes() for part in together]
    finally:
        torch.set_num_threads(before)


def test_no_rows_at_all(sampler):
    token, log_probability, finite = sampler.sample(torch.empty(0, 9), options(0), positions(0), 9)
    assert (len(token), len(log_probability), len(finite)) == (0, 0, 0)
    assert len(sampler.score(torch.empty(0, 9), np.empty(0, np.int32))) == 0


def test_types_are_those_of_the_contract(sampler):
    token, log_probability, finite = sampler.sample(torch.randn(2, 9).bfloat16(), options(2), positions(2), 9)
    assert (token.dtype, log_probability.dtype, finite.dtype) == (np.int32, np.float32, np.bool_)
    assert sampler.score(torch.randn(2, 9), np.array([1, 2], np.int32)).dtype == np.float32


def test_scores_are_log_probabilities_over_all_rows_of_the_head(sampler):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(8))
    logits[3, 4] = torch.nan
    target = np.array([0, 9, 5, 2, 11], np.int32)
    found = sampler.score(logits, target)
    model = logits.double().log_softmax(-1)[np.arange(5), target].numpy()
    np.testing.assert_allclose(found[[0, 1, 2, 4]], model[[0, 1, 2, 4]], atol=1e-6)
    assert np.isnan(found[3])
