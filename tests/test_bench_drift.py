"""What a long run tells beside its figures: drift, and what is left behind."""

from __future__ import annotations

import random

from simulated_queue import answer

from tramontane.client import RouterStats, Stats
from tramontane.client.loadtest.judging.drift import drift_findings, leftovers
from tramontane.client.loadtest.record import Record


def records(first_ms: float, growth: float, seconds: int = 120, rate: int = 5) -> list[Record]:
    """Requests whose first token takes `first_ms`, growing by the share `growth` over the run, with 10 % noise."""
    chance = random.Random(0)
    made = []
    for number in range(seconds * rate):
        at_s = number / rate
        wait_s = first_ms / 1000 * (1 + growth * at_s / seconds) * chance.uniform(0.9, 1.1)
        first_s = at_s + wait_s
        made.append(answer(at_s, first_s, first_s + 0.02, tokens=2))
    return made


def test_a_steady_server_does_not_drift():
    assert drift_findings(records(100, growth=0.0), (0.0, 120.0)) == ()
    assert drift_findings(records(100, growth=0.05), (0.0, 120.0)) == ()  # too little to matter


def test_a_server_that_gets_slower_drifts():
    (found,) = drift_findings(records(100, growth=0.5), (0.0, 120.0))
    assert "ttft p50 drifted by +3" in found.text


def test_a_short_run_says_nothing():
    assert drift_findings(records(100, growth=0.9, seconds=50), (0.0, 50.0)) == ()


def router(**held) -> Stats:
    counters = dict.fromkeys(("microbatches", "tokens", "prompt_tokens", "completion_tokens", "preemptions"), 9)
    gauges = {"waiting": 0, "running": 0, "in_flight_microbatches": 0, "kv_blocks_used": (0, 0)} | held
    return Stats(
        processes=(), stages=(), routers=(RouterStats(name="0", kv_blocks_total=(9, 9), **counters, **gauges),)
    )


def test_what_a_router_still_holds_is_said():
    assert leftovers(None) == ()
    assert leftovers(router()) == ()
    (found,) = leftovers(router(running=2, kv_blocks_used=(3, 4)))
    assert "2 running, 7 KV blocks" in found.text
