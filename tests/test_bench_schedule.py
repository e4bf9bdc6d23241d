"""Loads as the command line names them, and the plans that they make with a workload."""

from __future__ import annotations

import json

import pytest

from tramontane.client.loadtest.load import schedule
from tramontane.client.loadtest.load.lengths import Fixed
from tramontane.client.loadtest.load.prompt_file import read_prompt_file
from tramontane.client.loadtest.load.trace import read_trace
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
    plan = schedule.replayed(read_trace(path), 2.0, 0.0, 0, INFO, 4.0)
    assert plan.arrivals_s == (0.0, 0.5, 2.0)
    assert 2.0 < plan.load.duration_s < 2.01
    assert plan.load.detail == f"{path}, 2 times as fast"
    assert plan.notes == ()


def test_the_end_of_a_trace_is_replayed_at_its_own_rate(tmp_path):
    """At 25, 26 and 26.5 s: 2 requests a second, and no silence before them; the last is unusable and is named."""
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at, "input_length": 20, "output_length": 4} for at in (25000, 26000, 26500)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "output_length": 0}]))
    plan = schedule.replayed(read_trace(path), 1.0, 0.0, 0, INFO, 4.0)
    assert plan.load.rate == pytest.approx(2.0, rel=0.01)
    assert plan.load.detail == f"{path}; its first arrival, at 25 s, is the run's start"
    assert plan.notes == (
        "1 entry of trace.jsonl was passed over, line 4: max_tokens is 0; it must lie in 1 .. 10,000,000",
    )


def test_a_plan_says_what_it_left_of_its_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("a", "b" * 20_000, "c")
    path.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts))
    plan = schedule.at_rate(5, 4, 1, seed=3).plan(Workload(source=read_prompt_file(path), completion=Fixed(4)), INFO)
    assert {ask.prompt for ask in plan.asks} == {"a", "c"}
    assert plan.notes == (
        "keys of prompts.jsonl that were not read: 'id'",
        "1 entry of prompts.jsonl was passed over, line 2: a prompt of 5,001 tokens and max_tokens 4 need 5,005; "
        "the context is 4,096",
    )


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
