"""A stage that takes far too long is named first, and breaks the pipeline only after the limit."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from local_pipeline import LocalPipeline
from models import cached_checkpoint

from tramontane.cluster import step_watch
from tramontane.cluster.messages import EndReason
from tramontane.cluster.step_cost import StepCost, StepLoad
from tramontane.cluster.step_watch import Progress, StepWatch

LOAD = StepLoad(8, 0, 80)
COST = StepCost(base_s=0.5, decode_row_s=0.0, prompt_row_s=0.0, key_s=0.0)


def paces(watch, upto, *, load=LOAD, cost=COST, since_s=0.0, every_s=0.5):
    return [watch.look(n * every_s, since_s, load, cost).progress for n in range(int(upto / every_s))]


def test_a_size_that_was_never_seen_is_never_late():
    watch = StepWatch(stages=1, hang_limit_s=45.0)
    assert set(paces(watch, 45)) == {Progress.FINE}
    assert watch.look(45.5, 0.0, LOAD, COST) == (Progress.HUNG, 45.5)


def test_at_least_five_seconds_pass_and_four_times_the_cost():
    quick, slow = StepWatch(stages=1, hang_limit_s=45.0), StepWatch(stages=4, hang_limit_s=45.0)
    for watch in (quick, slow):
        watch.came_back(LOAD)
    assert paces(quick, 20).index(Progress.LATE) == 11  # at 5.5 s
    assert paces(slow, 20).index(Progress.LATE) == 17  # at 8.5 s: four stages


def test_a_step_may_take_ten_times_its_cost_whatever_the_limit():
    watch, slow = StepWatch(stages=1, hang_limit_s=45.0), COST._replace(base_s=20.0)
    watch.came_back(LOAD)
    assert Progress.HUNG not in paces(watch, 199, cost=slow)
    assert watch.look(200.5, 0.0, LOAD, slow).progress is Progress.HUNG


def test_a_watcher_that_was_stopped_itself_blames_nobody():
    watch = StepWatch(stages=1, hang_limit_s=45.0)
    watch.came_back(LOAD)
    watch.look(1.0, 0.5, LOAD, COST)
    assert watch.look(61.0, 0.5, LOAD, COST).progress is Progress.FINE
    assert watch.look(61.5, 0.5, LOAD, COST).progress is Progress.FINE


def test_an_empty_pipe_is_fine():
    watch = StepWatch(stages=1, hang_limit_s=45.0)
    assert {watch.look(now, 0.0, None, None).progress for now in range(0, 200, 2)} == {Progress.FINE}


@pytest.fixture(scope="module")
def folder():
    torch.set_num_threads(1)
    return cached_checkpoint("MixtralForCausalLM", seed=3, num_hidden_layers=4, max_position_embeddings=256)


async def stalled(pipeline, gate):
    """A stream whose second stage waits at the gate from its next step on."""
    _, heard = pipeline.submit([5, 17, 29], max_tokens=60)
    await heard.first.wait()
    stage = pipeline.workers[1]._stage
    step = stage.step
    stage.step = lambda microbatch: (gate.wait(60), step(microbatch))[1]
    return heard


async def test_a_late_stage_is_named_and_its_stream_goes_on(folder, monkeypatch):
    monkeypatch.setattr(step_watch, "LATE_LEAST_S", 0.2)
    gate = threading.Event()
    async with LocalPipeline(folder, [2, 2]) as pipeline:
        expected = (await pipeline.generate([5, 17, 29], max_tokens=60)).tokens
        heard = await stalled(pipeline, gate)
        async with asyncio.timeout(20):
            while not pipeline.router.stats().late:
                await asyncio.sleep(0.05)
        assert pipeline.router.stats().late.startswith("stage 1 is late with step ")
        gate.set()
        await heard.finished
        assert heard.tokens == expected
        async with asyncio.timeout(20):
            while pipeline.router.stats().late:
                await asyncio.sleep(0.05)


async def test_a_stage_that_hangs_breaks_the_pipeline_by_name(folder, monkeypatch):
    monkeypatch.setattr(step_watch, "LATE_LEAST_S", 0.2)
    gate = threading.Event()
    async with LocalPipeline(folder, [2, 2], hang_limit_s=1.0) as pipeline:
        heard = await stalled(pipeline, gate)
        await asyncio.wait_for(asyncio.shield(heard.finished), 20)
        gate.set()
        assert heard.reason is EndReason.BROKEN
        assert "stage 1 is late with step" in heard.finished.result().detail
