"""Costs are learned from noisy steps, follow the machine, and stay in proportion where steps say nothing."""

from __future__ import annotations

import random

import pytest

from tramontane.cluster.step_cost import StepCost, StepCosts, StepLoad

TRUE = StepCost(base_s=0.002, decode_row_s=0.0002, prompt_row_s=0.0001, key_s=1e-7)
SIZES = [StepLoad(rows, 0, 10.0 * rows) for rows in (1, 2, 4, 8, 16, 32)] + [
    StepLoad(0, 64, 4e3),
    StepLoad(0, 128, 2e4),
]


def warmed_up(cost: StepCost = TRUE) -> StepCosts:
    costs = StepCosts()
    costs.warmed_up([(load, cost.seconds(load)) for load in SIZES])
    return costs


def test_nothing_is_known_before_anything_was_measured():
    costs = StepCosts()
    costs.warmed_up([])
    costs.observe(StepLoad(4, 0, 40), 0.1)
    assert costs.cost is None


def test_the_warm_up_is_fitted():
    cost = warmed_up().cost
    for load in [*SIZES, StepLoad(20, 100, 1000)]:
        assert cost.seconds(load) == pytest.approx(TRUE.seconds(load), rel=0.05)


def test_without_prompts_a_prompts_row_is_taken_for_a_decode_row():
    costs = StepCosts()
    costs.warmed_up([(load, TRUE.seconds(load)) for load in SIZES if load.decode_rows])
    assert costs.cost.prompt_row_s == costs.cost.decode_row_s > 0


def test_live_steps_are_learned_through_noise():
    costs, dice = warmed_up(StepCost(0.001, 0.0004, 0.0001, 0.0)), random.Random(1)
    for _ in range(1500):
        load = StepLoad(dice.randint(1, 64), dice.choice([0, 0, 30, 200]), dice.uniform(1e3, 1e5))
        costs.observe(load, TRUE.seconds(load) * dice.uniform(0.8, 1.2))
    for load in (StepLoad(30, 0, 3e4), StepLoad(10, 100, 5e4), StepLoad(60, 200, 1e5)):
        assert costs.cost.seconds(load) == pytest.approx(TRUE.seconds(load), rel=0.1)


def test_steps_that_are_all_alike_keep_the_warm_ups_proportions():
    """Four times as slow, and only one size is seen: the others are four times as slow, too."""
    costs, load = warmed_up(), StepLoad(30, 60, 5e3)
    for _ in range(1500):
        costs.observe(load, 4 * TRUE.seconds(load))
    for other in (StepLoad(1, 0, 10), StepLoad(64, 0, 640), StepLoad(0, 128, 2e4)):
        assert costs.cost.seconds(other) == pytest.approx(4 * TRUE.seconds(other), rel=0.2)


def test_a_process_that_was_stopped_for_half_a_minute_says_nothing():
    costs, load = warmed_up(), StepLoad(30, 60, 5e3)
    for step in range(300):
        costs.observe(load, 30.0 if step == 200 else TRUE.seconds(load))
    assert costs.cost.seconds(load) == pytest.approx(TRUE.seconds(load), rel=0.05)


def test_costs_are_never_negative():
    costs, dice = warmed_up(), random.Random(2)
    for _ in range(600):
        costs.observe(StepLoad(dice.randint(0, 9), dice.randint(0, 9), dice.uniform(0, 99)), dice.uniform(0, 0.1))
        assert min(costs.cost) >= 0
