"""Layers are cut by cost, and no other cut has a cheaper costliest stage."""

import dataclasses
import itertools

import pytest

from tramontane.stages.config import EXAMPLE
from tramontane.stages.split import head_cost, layer_cost, split_as, split_layers


def cuts(layers, stages):
    """Every way to cut so many layers into consecutive slices."""
    for inner in itertools.combinations(range(1, layers), stages - 1):
        edges = (0, *inner, layers)
        yield [stop - start for start, stop in itertools.pairwise(edges)]


def costliest(config, counts):
    costs = [count * layer_cost(config) for count in counts]
    costs[-1] += head_cost(config)
    return max(costs)


@pytest.mark.parametrize("vocab", [1, 64, 600, 3000, 20_000])
def test_no_cut_is_better(vocab):
    for layers in range(1, 10):
        config = dataclasses.replace(EXAMPLE, vocab=vocab, windows=(None,) * layers)
        for stages in range(1, layers + 1):
            counts = [len(span) for span in split_layers(config, stages)]
            best = min(costliest(config, other) for other in cuts(layers, stages))
            assert costliest(config, counts) == best, (layers, stages, counts)


def test_slices_are_consecutive_and_complete():
    config = dataclasses.replace(EXAMPLE, windows=(8,) * 11)
    for stages in range(1, 12):
        spans = split_layers(config, stages)
        assert len(spans) == stages
        assert [layer for span in spans for layer in span] == list(range(11))
        assert all(span.step == 1 and len(span) >= 1 for span in spans)


def test_equal_layers_are_shared_evenly():
    """The head of Mixtral 8x7B is a fraction of a layer: 32 layers over 4 stages are 4 x 8."""
    mixtral = dataclasses.replace(
        EXAMPLE, vocab=32_000, dim=4096, heads=32, kv_heads=8, head_dim=128, ffn_dim=14_336, experts=8,
        windows=(None,) * 32,
    )  # fmt: skip
    assert [len(span) for span in split_layers(mixtral, 4)] == [8, 8, 8, 8]


def test_a_heavy_head_lightens_the_last_stage():
    config = dataclasses.replace(EXAMPLE, vocab=20_000, windows=(8,) * 8)
    counts = [len(span) for span in split_layers(config, 3)]
    assert counts == [4, 3, 1]


def test_layer_cost_counts_the_experts_that_sixteen_rows_read():
    dense = dataclasses.replace(EXAMPLE, experts=0, experts_per_token=0)
    attention = 16 * 8 * (2 * 4 + 2 * 2)
    assert layer_cost(dense) == attention + 3 * 16 * 24
    few = dataclasses.replace(EXAMPLE, experts=64, experts_per_token=1)
    touched = 64 * (1 - (63 / 64) ** 16)
    assert 14 < touched < 15
    assert layer_cost(few) == pytest.approx(attention + 16 * 64 + touched * 3 * 16 * 24)


@pytest.mark.parametrize("stages", [-1, 0, 5])
def test_more_stages_than_layers_are_refused(stages):
    with pytest.raises(ValueError, match=f"stages is {stages}; a model of 4 layers takes 1 to 4"):
        split_layers(EXAMPLE, stages)


@pytest.mark.parametrize("counts", [[3, 2], [4, 0], [5, -1], [], [1, 1]])
def test_a_split_that_does_not_fit_is_refused(counts):
    with pytest.raises(ValueError, match=f"split is {','.join(map(str, counts))}.*the model has 4"):
        split_as(EXAMPLE, counts)
