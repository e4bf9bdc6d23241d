"""Loads as the command line names them, and the plans that they make with a workload."""

from __future__ import annotations

import json

import pytest

from tramontane.client.loadtest.load import schedule
from tramontane.client.loadtest.load.lengths import Fixed
from tramontane.client.loadtest.load.workload import Workload
from tramontane.client.loadtest.result import TargetInfo

INFO = TargetInfo(kind="grpc", address="x:1", model="tiny", context_tokens=4096, vocabulary_tokens=1024)
WORKLOAD = Workload(prompt=Fixed(8), completion=Fixed(4))


def test_a_plan_has_an_ask_for_each_arrival():
    plan = schedule.at_rate(5, 4, 1, seed=3, process="constant").plan(WORKLOAD, INFO)
    assert len(plan.asks) == len(plan.arrivals_s) == 20
    assert plan.load.rate == 5
    assert plan.load.burstiness is None
    assert [len(ask.prompt) for ask in plan.asks] == [8] * 20


def test_levels_of_a_sweep_share_their_requests():
    few = schedule.at_rate(2, 10, 0, seed=3).plan(WORKLOAD, INFO)
    many = schedule.at_rate(20, 10, 0, seed=3).plan(WORKLOAD, INFO)
    assert many.asks[: len(few.asks)] == few.asks


def test_a_closed_loop_has_users_and_no_arrivals():
    plan = schedule.closed(3, 10, 2, seed=0).plan(WORKLOAD, INFO)
    assert (plan.load.users, plan.arrivals_s, plan.load.is_open) == (3, (), False)
    assert len(plan.asks) == schedule.CLOSED_ASKS


def test_steps_and_ramps_say_their_mean_rate():
    steps = schedule.in_steps(((2.0, 10.0), (4.0, 30.0)), 0, seed=0)
    assert (steps.load.rate, steps.load.duration_s) == (3.5, 40.0)
    assert steps.load.detail == "2/s for 10 s, 4/s for 30 s"
    ramp = schedule.as_ramp((1.0, 5.0), 20, 0, seed=0)
    assert ramp.load.rate == 3.0
    assert 40 < len(ramp.arrivals_s) < 80


def test_a_replay_measures_its_last_arrival(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"at_s": at, "prompt_tokens": 3, "max_tokens": 2}) + "\n" for at in (0, 1, 4)))
    plan = schedule.replay(path, 2.0, 0.0, 0, INFO, 4.0)
    assert plan.arrivals_s == (0.0, 0.5, 2.0)
    assert 2.0 < plan.load.duration_s < 2.01
    assert "2 times as fast" in plan.load.detail


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedule.closed(0, 10, 0, seed=0), "users is 0"),
        (lambda: schedule.at_rate(2, 10, 10, seed=0), "warmup is 10 s"),
        (lambda: schedule.at_rate(0.001, 1, 0, seed=0).plan(WORKLOAD, INFO), "gives no arrival"),
        (lambda: schedule.closed(1, 9, 0, seed=0).plan(Workload(prompt=Fixed(5000)), INFO), "context"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
