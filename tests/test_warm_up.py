"""The warm-up tries sizes while they pay and time allows, and leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest
from simulated_pipeline import SimulatedStages, zeros

from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.step_cost import StepCost, StepCosts
from tramontane.cluster.warm_up import WARM_UP_S, WarmUp
from tramontane.stages.kv_layout import KVLayout


class Pipe:
    """Takes a scheduler's sequences through a pipeline of these costs, on a clock that is a number."""

    def __init__(self, cost: StepCost, stages: int) -> None:
        self.cost, self.stages, self.now, self.step, self.sizes = cost, stages, 100.0, 0, []

    async def run(self, scheduler: Scheduler) -> None:
        stages = SimulatedStages(self.cost, self.stages)
        while scheduler.outstanding_tokens:
            while (microbatch := scheduler.schedule(1, self.step, self.now)) is not None:
                self.step += 1
                load = scheduler._in_flight[-1].load
                self.sizes.append((load.decode_rows, load.prompt_rows))
                stages.send(microbatch, load, self.now)
            self.now, microbatch = stages.pipe.popleft()
            scheduler.update(zeros(microbatch), self.now)
        assert not any(scheduler.used_blocks)


def measured(cost: StepCost, stages: int, **changes) -> tuple[StepCosts, Pipe]:
    layout = KVLayout(block=16, chunk=128, windows=(None,), rings=(64,), pool_blocks=(4096,))
    options = {"layout": layout, "context": 1024, "max_batch_tokens": 512, "max_waiting": 4} | changes
    pipe, costs = Pipe(cost, stages), StepCosts()
    warm_up = WarmUp(SchedulerOptions(**options), stages, pipe.run, lambda: pipe.now)
    costs.warmed_up(asyncio.run(warm_up.measure()))
    return costs, pipe


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_quick_model_is_measured_over_many_sizes(stages):
    true = StepCost(base_s=0.0005, decode_row_s=0.00005, prompt_row_s=0.00003, key_s=0.0)
    costs, pipe = measured(true, stages)
    assert {rows for rows, _ in pipe.sizes} >= {1, 2, 4, 8, 16}
    assert max(prompt for _, prompt in pipe.sizes) >= 128
    assert pipe.now - 100.0 < 2 * WARM_UP_S
    assert costs.cost.rows_worth_while(10.0) == pytest.approx(true.rows_worth_while(10.0), rel=0.25)
    assert costs.cost.prompt_row_s == pytest.approx(true.prompt_row_s, rel=0.25)


def test_a_slow_model_is_measured_at_its_smallest_size_only():
    costs, pipe = measured(StepCost(base_s=2.0, decode_row_s=0.1, prompt_row_s=0.1, key_s=0.0), stages=2)
    assert {rows for rows, _ in pipe.sizes} <= {0, 1}
    assert max(prompt for _, prompt in pipe.sizes) <= 2
    assert 1.5 < costs.cost.base_s < 3.0


def test_little_kv_and_a_short_context_are_enough():
    layout = KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(4,))
    costs, _ = measured(StepCost(0.001, 0.0001, 0.0001, 0.0), 2, layout=layout, context=4, max_batch_tokens=2)
    assert costs.cost is not None
