"""A server whose delays are known, measured by the whole way from plan to figures: exact on a virtual clock."""

from __future__ import annotations

import pytest
from scripted_target import Scripted, closed_plan, drive_to_end, open_plan

from tramontane.client.loadtest.judging.measures import measure
from tramontane.client.loadtest.judging.objectives import parse_objective


def measured(plan, target, *objectives: str):
    records = drive_to_end(plan, target, drain_s=60.0)
    window_s = (plan.load.warmup_s, plan.load.duration_s)
    return measure(records, plan.load, window_s, [parse_objective(text) for text in objectives])


def test_a_steady_server_is_measured_exactly():
    """400 requests at 40/s; the first token after 120 ms, nine more 20 ms apart: 300 ms in all."""
    plan = open_plan(*(index / 40 for index in range(400)), duration_s=10.0)
    found = measured(plan, Scripted(first_s=0.12, gap_s=0.02, tokens=10), "ttft:p95<150ms", "itl:p95<30ms")
    for measure_name, value in {"ttft": 120, "itl": 20, "tpot": 20, "e2el": 300, "e2el_per_token": 30}.items():
        latencies = found.latencies[measure_name]
        assert latencies.minimum == pytest.approx(value)
        assert latencies.maximum == pytest.approx(value)
        assert latencies.at(0.95) == pytest.approx(value)
    # Those due in the last 0.3 s end after the window.
    assert found.throughput.requests_per_s == pytest.approx(38.8, abs=0.11)
    assert found.throughput.goodput_share == 1.0
    assert all(kept.met for kept in found.objectives)


def test_goodput_counts_those_that_keep_every_objective():
    """A stall of 2 s from 4 s on, at 10 requests/s: who is due in its first 1.5 s misses 500 ms for the first token."""
    plan = open_plan(*(index / 10 for index in range(100)), duration_s=10.0)
    found = measured(plan, Scripted(first_s=0.1, gap_s=0.0, tokens=1, stall=(4.0, 6.0)), "ttft:p90<500ms")
    # Due at 3.9 .. 5.4: their first token would come in the stall, and they wait longer than 0.5 s for its end.
    assert found.throughput.goodput_share == pytest.approx(1 - 16 / 100)
    assert found.objectives[0].met is False


def test_coordinated_omission():
    """A server that stalls for 2 s. An open loop sees who would have come meanwhile; a closed one sees one request."""
    stalling = {"first_s": 0.01, "gap_s": 0.0, "tokens": 1, "stall": (4.0, 6.0)}
    schedule = tuple(index / 100 for index in range(1000))
    honest = measured(open_plan(*schedule, duration_s=10.0), Scripted(**stalling)).latencies["ttft"]
    # 200 of 1,000 wait for the stall's end, evenly between 0 and 2 s: the slowest hundredth waits 1.9 s and more.
    assert honest.at(0.99) == pytest.approx(1910, abs=15)
    assert honest.at(0.9) == pytest.approx(1010, abs=15)
    closed = measured(closed_plan(users=1, asks=1000, duration_s=10.0), Scripted(**stalling)).latencies["ttft"]
    assert closed.maximum == pytest.approx(2010, abs=15)
    assert closed.at(0.95) == pytest.approx(10)  # one of 800 requests was slow
