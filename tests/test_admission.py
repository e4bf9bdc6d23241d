"""Who is let in, on a clock that is a number: a crowd gets what the pipeline can give, and the rest a quick no."""

from __future__ import annotations

import pytest
from simulated_pipeline import COST, Request, SimulatedPipeline, poisson

from tramontane.cluster.admission import MAY_ALWAYS_WAIT, RefusalReason, Refused

STAGES = pytest.mark.parametrize("stages", [1, 2, 4])


def quantile(values, q):
    ordered = sorted(values)
    return ordered[int(q * len(ordered))]


def goodput(requests, warm_up_s, end_s):
    return sum(r.good for r in requests if warm_up_s <= r.arrived_s < end_s) / (end_s - warm_up_s)


def gaps(requests):
    return [after - before for r in requests for before, after in zip(r.tokens_s, r.tokens_s[1:], strict=False)]


def load(pipeline, rate, seconds=20.0, **values):
    requests = poisson(rate, seconds, **values)
    pipeline.run(requests)
    return requests


def reasons(requests):
    return {r.refused.reason for r in requests if r.refused}


# A crowd


@STAGES
def test_a_crowd_gets_what_the_pipeline_can_give(stages):
    """The simulated pipeline gives some 65 answers a second at its best."""
    easy, peak = (load(SimulatedPipeline(stages=stages), rate, 12.0) for rate in (50, 70))
    assert not reasons(easy)
    best = goodput(peak, 4, 12)
    for times in (2, 5):
        crowd = load(SimulatedPipeline(stages=stages), times * best, 12.0)
        served = [r for r in crowd if r.good and r.arrived_s > 4]
        assert goodput(crowd, 4, 12) >= 0.9 * best
        assert not any(r.late for r in crowd)
        assert reasons(crowd) == {RefusalReason.QUEUE_WAIT}
        assert quantile((r.ttft_s for r in served), 0.95) <= 2.0 + quantile((r.ttft_s for r in easy), 0.95) + 0.25
        assert quantile(gaps(served), 0.95) <= 1.2 * quantile(gaps(r for r in peak if r.arrived_s > 4), 0.95)


def test_without_a_bound_on_the_wait_nobody_is_refused_and_most_come_too_late():
    """The safeguard off: what a crowd got before."""
    crowd = load(SimulatedPipeline(max_queue_wait_s=0.0, max_waiting=10**6), 200, 10.0)
    assert reasons(crowd) <= {RefusalReason.DEADLINE}
    assert quantile((r.ttft_s for r in crowd if r.good), 0.9) > 4.0


@pytest.mark.parametrize("slowness", [0.5, 3.0])
def test_costs_follow_the_machine(slowness):
    """It became quicker or slower since the warm-up, as beside other tenants."""
    pipeline = SimulatedPipeline(slowness=slowness)
    crowd = load(pipeline, 150 / slowness, 20.0)
    served = [r for r in crowd if r.good and r.arrived_s > 12]
    assert 1.5 < quantile((r.ttft_s for r in served), 0.5) < 2.5
    assert goodput(crowd, 12, 20) > 50 / slowness
    assert pipeline.costs.cost.seconds(pipeline.loads[-1][0]) == pytest.approx(
        slowness * COST.seconds(pipeline.loads[-1][0]), rel=0.3
    )


def test_mixed_lengths_deadlines_and_bursts_starve_nobody():
    requests = poisson(60, 30) + poisson(1, 30, seed=1, prompt=3900, max_tokens=100, timeout_s=60.0)
    requests += poisson(20, 30, seed=2, max_tokens=16, timeout_s=1.0)
    requests += [Request(arrived_s=10.0, prompt=100, max_tokens=64) for _ in range(300)]
    SimulatedPipeline().run(requests)
    taken = [r for r in requests if r.refused is None]
    assert all(r.good for r in taken if r.timeout_s != 1.0)
    assert sum(r.late for r in taken) < 0.05 * len(taken)
    long = [r for r in taken if r.prompt == 3900]
    assert len(long) > 5
    assert all(r.ttft_s < 8 for r in long)


def test_kv_that_is_scarce_bounds_the_queue_too():
    """Room for some twenty sequences: the rest waits for KV, not for seats."""
    pipeline = SimulatedPipeline(pool_blocks=160)
    crowd = load(pipeline, 200)
    served = [r for r in crowd if r.good and r.arrived_s > 4]
    assert not any(r.late for r in crowd)
    assert quantile((r.ttft_s for r in served), 0.95) < 3.0
    assert goodput(crowd, 4, 20) > 20


@pytest.mark.parametrize(("rate", "pool_blocks"), [(30, 16_384), (65, 16_384), (200, 16_384), (200, 160)])
def test_estimates_come_true(rate, pool_blocks):
    """By seats, and by KV that is scarce."""
    pipeline = SimulatedPipeline(stages=2, pool_blocks=pool_blocks)
    served = [r for r in load(pipeline, rate, 12.0) if r.good and r.arrived_s > 4]
    errors = [r.estimated_s - r.ttft_s for r in served]
    assert quantile(errors, 0.9) < 0.25
    assert quantile(errors, 0.1) > -0.5


# One request


def busy():
    """A pipeline whose seats are taken and whose queue is full, by estimate, at a time of 5 s."""
    pipeline = SimulatedPipeline()
    pipeline.run(poisson(150, 5.0), until_s=5.0)
    while submit(pipeline) is None:
        pass
    return pipeline


def submit(pipeline, **values):
    options = {"arrived_s": pipeline.now, "prompt": 100, "max_tokens": 64} | values
    request = Request(**options)
    pipeline._submit(request)
    return request.refused


def test_an_idle_pipeline_takes_any_request_that_fits():
    pipeline = SimulatedPipeline(max_queue_wait_s=0.001)
    request = Request(arrived_s=0.0, prompt=3900, max_tokens=100)
    pipeline.run([request])
    assert request.good


def test_a_few_may_always_wait():
    """With one seat and hardly any wait allowed."""
    pipeline = SimulatedPipeline(max_queue_wait_s=0.001, max_running=1)
    requests = [Request(arrived_s=0.0, prompt=500, max_tokens=500) for _ in range(20)]
    pipeline.run(requests)
    assert sum(r.good for r in requests) == 1 + MAY_ALWAYS_WAIT
    assert reasons(requests) == {RefusalReason.QUEUE_WAIT}


def test_who_would_wait_too_long_hears_when_there_is_room():
    pipeline = busy()
    refusals = [submit(pipeline) for _ in range(50)]
    assert {refusal.reason for refusal in refusals} == {RefusalReason.QUEUE_WAIT}
    assert "would wait" in str(refusals[0])
    assert "the limit (max-queue-wait) is 2 s" in str(refusals[0])
    hints = [refusal.retry_after_s for refusal in refusals]
    assert hints == sorted(hints), "each has its own turn"
    assert hints[-1] - hints[0] == pytest.approx(50 / 65, rel=0.5), "as the pipeline will have room"


def test_a_deadline_that_will_be_missed_is_refused_before_it_costs_anything():
    pipeline = busy()
    refusal = submit(pipeline, timeout_s=1.0)
    assert refusal.reason is RefusalReason.DEADLINE or "would wait" in str(refusal)
    idle = SimulatedPipeline()
    idle.scheduler._forecast.lengths.ended(64, 64)
    refusal = submit(idle, prompt=3900, timeout_s=0.1)
    assert refusal.reason is RefusalReason.DEADLINE
    assert "at best, and its deadline is in 0.1 s" in str(refusal)
    assert idle.scheduler.tokens == 0


def test_max_tokens_alone_refuse_nobody():
    """Completions that stop early tell how long others become; before, half of max_tokens counts."""
    pipeline = SimulatedPipeline()
    asked = {"max_tokens": 3000, "timeout_s": 2.0}
    assert submit(pipeline, **asked) is not None
    taught = [Request(arrived_s=float(at), prompt=50, max_tokens=3000, output=20) for at in range(20)]
    pipeline.run(taught)
    assert all(r.good for r in taught)
    assert submit(pipeline, **asked) is None


def test_who_waits_and_can_no_longer_end_in_time_is_turned_away_before_its_prefill():
    pipeline = SimulatedPipeline(max_running=1, max_queue_wait_s=60.0)
    first = Request(arrived_s=0.0, prompt=100, max_tokens=2000)  # taken for half of that, some 4 s
    late = Request(arrived_s=0.0, prompt=100, max_tokens=64, timeout_s=6.0)
    pipeline.run([first, late])
    assert first.good
    assert first.ended_s > 7.0
    assert late.estimated_s > 3.0
    assert late.refused.reason is RefusalReason.DEADLINE
    assert sum(load.prompt_rows for load, _ in pipeline.loads) == 100


def test_the_preempted_are_never_refused():
    """Not even when they have become hopeless: they end at their deadline."""
    pipeline = SimulatedPipeline(pool_blocks=130, max_queue_wait_s=0.01)
    requests = [Request(arrived_s=0.0, prompt=300, max_tokens=900, timeout_s=t) for t in (60, 60, 60, 5, 5, 5)]
    pipeline.run(requests)
    assert pipeline.scheduler.preemptions
    assert not reasons(requests)
    assert any(r.late for r in requests)


def test_without_figures_only_the_length_of_the_queue_counts():
    pipeline = SimulatedPipeline(measured=False, max_waiting=50, max_running=4)
    requests = [Request(arrived_s=0.0, prompt=100, max_tokens=64, timeout_s=0.5) for _ in range(100)]
    pipeline.run(requests)
    assert sum(r.refused is None for r in requests) == 54
    refusal = next(r.refused for r in requests if r.refused)
    assert (refusal.reason, refusal.retry_after_s) == (RefusalReason.QUEUE_FULL, None)
    assert pipeline.scheduler.estimated_wait_s(pipeline.now) is None


def test_a_refusal_leaves_nothing_behind():
    pipeline = busy()
    waiting, running, blocks = pipeline.scheduler.waiting, pipeline.scheduler.running, pipeline.scheduler.used_blocks
    assert isinstance(submit(pipeline), Refused)
    assert (pipeline.scheduler.waiting, pipeline.scheduler.running) == (waiting, running)
    assert pipeline.scheduler.used_blocks == blocks
    pipeline.run([])


# Steps


def test_a_step_beside_decode_is_bounded_by_time_and_alone_it_is_not():
    pipeline = SimulatedPipeline(max_step_s=0.012)
    pipeline.run([Request(arrived_s=0.0, prompt=2000, max_tokens=8)])
    assert max(load.prompt_rows for load, _ in pipeline.loads) == 128  # a chunk
    pipeline.loads.clear()
    load(pipeline, 60)
    floor = -(-64 // 2)
    for step, beside in pipeline.loads:
        decode_s = COST.seconds(step._replace(prompt_rows=0))
        longest = max(0.012, 2 * decode_s) * 1.2  # by the scheduler's own, learned costs
        assert not beside or step.prompt_rows <= floor or COST.seconds(step) <= longest


def test_a_round_always_has_room_for_some_prefill():
    pipeline = SimulatedPipeline(max_step_s=1e-6, stages=2)
    load(pipeline, 30)
    rows = [step.prompt_rows for step, beside in pipeline.loads if beside and step.prompt_rows]
    assert 32 in rows


def test_the_operators_limit_of_running_is_kept():
    pipeline = SimulatedPipeline(max_running=7)
    load(pipeline, 60, 5.0)
    assert pipeline.scheduler.capacity.seats == 7
    assert max(step.decode_rows for step, _ in pipeline.loads) <= 4  # two groups
