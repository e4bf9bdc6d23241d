"""Faults are read, reach exactly the process that the service means, and what they cost is counted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from calls import eventually

from tramontane.client.loadtest.generator.faults import (
    Fault,
    FaultOutcome,
    Kind,
    carry_out,
    find_process,
    inflict,
    parse,
    same_start,
)
from tramontane.client.loadtest.judging.fault_cost import longest_stall, recovery, reports
from tramontane.client.loadtest.plan import Conduct
from tramontane.client.loadtest.record import CUT, LEFT, OK, Record
from tramontane.client.loadtest.result import FaultReport
from tramontane.client.types import ProcessStats, Stats

STOPPED, ZOMBIE = psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE


# Reading


@pytest.mark.parametrize(
    ("text", "kind", "role", "name", "for_s", "at_s", "again"),
    [
        ("kill:stage=0.1@20s", Kind.KILL, "stage", "0.1", 0.0, 20.0, "kill:stage=0.1@20s"),
        ("stop:router,for=500ms@10", Kind.STOP, "router", None, 0.5, 10.0, "stop:router,for=0.5s@10s"),
        ("stop:gateway=2@1.5m", Kind.STOP, "gateway", "2", 3.0, 90.0, "stop:gateway=2,for=3s@90s"),
        ("kill:stage@0", Kind.KILL, "stage", None, 0.0, 0.0, "kill:stage@0s"),
        ("kill:stage@1h", Kind.KILL, "stage", None, 0.0, 3600.0, "kill:stage@3600s"),
    ],
)
def test_faults_are_read_and_said_again(text, kind, role, name, for_s, at_s, again):
    fault = parse(text)
    assert fault == Fault(kind=kind, role=role, name=name, for_s=for_s, at_s=at_s)
    assert str(fault) == again
    assert parse(again) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kill", "not of the form KIND:TARGET"),
        ("kill:stage", "not of the form KIND:TARGET"),
        ("kill:stage@1@2", "not of the form KIND:TARGET"),
        ("kill:stage,because=1@2", "not of the form KIND:TARGET"),
        ("burn:stage@1", "the kind is 'burn'; allowed are kill, stop"),
        ("kill:controller@1", "the target is 'controller'; allowed are stage, router, gateway"),
        ("kill:stage=1@1", "the stage's name is '1'; it must be replica.stage, such as 0.1"),
        ("kill:router=0.1@1", "the router's name is '0.1'; it must be a number, such as 0"),
        ("kill:router=@1", "the router's name is ''"),
        ("kill:stage,for=3s@1", "only a stop has for=TIME"),
        ("stop:stage,for=0@1", "for is 0; a stop must last longer than 0 s"),
        ("stop:stage,for=x@1", "for is 'x'; it must be a time such as 20s, 500ms or 1.5"),
        ("kill:stage@soon", "the time is 'soon'; it must be a time"),
        ("kill:stage@-1", "the time is '-1'"),
        ("kill:stage@1e9", "the time is '1e9'"),
    ],
)
def test_what_is_no_fault_is_told_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=f"(?s)^fault '{text}'.*{message}"):
        parse(text)


# Finding


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that may be harmed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield psutil.Process(child.pid)
    finally:
        child.kill()
        child.wait()


def told(process: psutil.Process, role: str = "stage", name: str = "0.0", late_s: float = 0.0) -> ProcessStats:
    """As the service tells of it; `late_s` says another start."""
    started_s = process.create_time() + late_s
    return ProcessStats(role=role, name=name, node="here", pid=process.pid, start_time_s=started_s, cpu_s=0.0)


def stats(*processes: ProcessStats) -> Stats:
    return Stats(processes=processes, stages=(), routers=())


def test_the_process_is_found_by_name_or_as_the_first_of_its_role(sleeper):
    elsewhere = told(sleeper, name="0.10", late_s=500.0)
    service = stats(elsewhere, told(sleeper, role="router", name="0", late_s=500.0), told(sleeper, name="0.9"))
    assert find_process(service, parse("kill:stage=0.9@1")) == (told(sleeper, name="0.9"), sleeper)
    assert find_process(service, parse("kill:stage@1"))[1] == sleeper, "0.9 comes before 0.10"
    with pytest.raises(ValueError, match=r"the service has no stage 1.0; of that role it has 0.9, 0.10"):
        find_process(service, parse("kill:stage=1.0@1"))
    with pytest.raises(ValueError, match=r"the service has no gateway; of that role it has none"):
        find_process(service, parse("kill:gateway@1"))


@pytest.mark.parametrize("late_s", [-3600.0, -2.0, -0.5, 0.1, 0.9, 2.0])
async def test_a_process_that_began_at_another_time_is_never_touched(sleeper, late_s):
    service = stats(told(sleeper, late_s=late_s))
    with pytest.raises(ValueError, match=r"is not on this host: the process of that pid here began at another time"):
        find_process(service, parse("kill:stage@1"))
    for text in ("kill:stage@0", "stop:stage,for=1ms@0"):
        done = await inflict(parse(text), service, lambda: 7.0)
        assert (done.at_s, done.over_s) == (7.0, 7.0)
        assert "began at another time" in done.error
    assert sleeper.status() not in (STOPPED, ZOMBIE)


def test_a_start_may_differ_by_a_tick_and_by_a_step_of_the_clock():
    assert [same_start(1000.25, 1000.25 + by) for by in (0.0, 0.01, -0.01, 1.0, -1.01)] == [True] * 5
    assert [same_start(1000.25, 1000.25 + by) for by in (0.05, -0.5, 0.95, 2.0)] == [False] * 4


def test_a_process_that_has_ended_is_said_to(sleeper):
    service = stats(told(sleeper))
    sleeper.kill()
    while sleeper.status() != ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="has ended already"):
        find_process(service, parse("kill:stage@1"))
    os.waitpid(sleeper.pid, 0)
    with pytest.raises(ValueError, match="is not on this host"):
        find_process(service, parse("kill:stage@1"))


def test_neither_this_process_nor_its_ancestors_are_harmed():
    own = psutil.Process()
    for process in (own, *own.parents()):
        with pytest.raises(ValueError, match="runs the load itself"):
            find_process(stats(told(process)), parse("kill:stage@1"))


# Doing


async def test_a_kill_ends_the_process(sleeper):
    done = await inflict(parse("kill:stage@1"), stats(told(sleeper)), lambda: 1.5)
    assert (done.at_s, done.over_s, done.error) == (1.5, 1.5, "")
    assert done.target == f"stage 0.0 (pid {sleeper.pid})"
    await eventually(lambda: sleeper.status() == ZOMBIE)


async def test_a_stop_is_followed_by_going_on(sleeper):
    stopping = asyncio.create_task(inflict(parse("stop:stage,for=200ms@0"), stats(told(sleeper)), time.monotonic))
    await eventually(lambda: sleeper.status() == STOPPED)
    done = await stopping
    assert done.over_s - done.at_s >= 0.2
    await eventually(lambda: sleeper.status() != STOPPED)


async def test_a_stop_that_is_cancelled_leaves_no_stopped_process(sleeper):
    stopping = asyncio.create_task(inflict(parse("stop:stage,for=10m@0"), stats(told(sleeper)), time.monotonic))
    await eventually(lambda: sleeper.status() == STOPPED)
    stopping.cancel()
    outcome = await stopping  # what was done is told, though the run ends early
    assert (outcome.error, outcome.at_s <= outcome.over_s) == ("", True)
    await eventually(lambda: sleeper.status() != STOPPED)


async def test_a_process_killed_while_it_is_stopped_is_no_error(sleeper):
    service = stats(told(sleeper))
    stopping = asyncio.create_task(inflict(parse("stop:stage,for=300ms@0"), service, time.monotonic))
    await eventually(lambda: sleeper.status() == STOPPED)
    assert (await inflict(parse("kill:stage@0"), service, time.monotonic)).error == ""
    assert (await stopping).error == ""


@pytest.mark.parametrize("answer", ["new", "nothing", "never"])
async def test_a_fault_waits_for_its_time_and_asks_for_the_newest_pids(sleeper, answer):
    begun = time.monotonic()
    right, old = stats(told(sleeper)), stats(told(sleeper, late_s=500.0))

    async def read() -> Stats | None:
        if answer == "never":
            await asyncio.sleep(600)
        return right if answer == "new" else None

    known = old if answer == "new" else right
    done = await carry_out(parse("kill:stage@300ms"), known, read, lambda: time.monotonic() - begun)
    assert done.error == ""
    assert done.at_s >= 0.3


# What it cost


def record(sent_s: float, ended_s: float, *messages_s: float, status: str = OK, conduct=Conduct.NORMAL) -> Record:
    return Record(
        number=0,
        intended_s=sent_s,
        sent_s=sent_s,
        message_times_s=messages_s,
        message_tokens=(1,) * len(messages_s),
        ended_s=ended_s,
        status=status,
        conduct=conduct,
    )


def steady(start: int, end: int) -> list[Record]:
    """A request every second, each of half a second and two messages."""
    return [record(s, s + 0.5, s + 0.25, s + 0.5) for s in range(start, end)]


def stopped(at_s: float, over_s: float, **changes: object) -> FaultOutcome:
    fault = parse(f"stop:stage,for={over_s - at_s}s@{at_s}")
    return FaultOutcome(**{"fault": fault, "at_s": at_s, "over_s": over_s, "target": "stage 0.0 (pid 7)", **changes})


def killed(at_s: float) -> FaultOutcome:
    return FaultOutcome(fault=parse(f"kill:stage@{at_s}"), at_s=at_s, over_s=at_s, target="stage 0.0 (pid 7)")


def test_the_example_of_the_head():
    records = [
        record(9.9, 13.04, 9.95, 13.02, 13.04),
        record(11.0, 12.0, status="RESOURCE_EXHAUSTED"),
        record(12.5, 13.05, 13.03, 13.05),
    ]
    (report,) = reports([stopped(10.0, 13.0)], [*steady(0, 9), *records, *steady(14, 20)], (0.0, 20.0))
    assert report == FaultReport(
        fault="stop:stage,for=3s@10s",
        at_s=10.0,
        target="stage 0.0 (pid 7)",
        errors=1,
        stall_s=pytest.approx(3.02),
        completed_per_s_before=pytest.approx(0.9),
        completed_per_s_after=pytest.approx(7 / 6.95),
    )


def test_what_never_came_back_has_no_end_of_its_stall_and_no_rate():
    broken = [record(9.9, 10.01, 9.95, 10.005, status="UNAVAILABLE")]  # a message was on its way
    refused = [record(s, s + 0.001, status="UNAVAILABLE") for s in range(11, 20)]
    bad = [record(15.0, 15.1, status="INVALID_ARGUMENT", conduct=Conduct.BAD)]
    (report,) = reports([killed(10.0)], [*steady(0, 9), *broken, *refused, *bad], (0.0, 20.0))
    assert (report.errors, report.stall_s, report.completed_per_s_after) == (10, None, None)
    assert report.completed_per_s_before == pytest.approx(0.9)


def test_a_fault_that_nobody_felt_cost_nothing():
    (report,) = reports([killed(10.0)], steady(0, 20), (0.0, 20.0))
    assert (report.errors, report.stall_s, report.completed_per_s_before) == (0, pytest.approx(0.25), 1.0)
    assert report.completed_per_s_after == pytest.approx(10 / 9.5)


def test_leaving_and_being_cut_are_no_errors():
    records = [record(9.0, 10.5, 10.1, status=LEFT), record(9.0, 11.0, 10.9, status=CUT), *steady(12, 20)]
    (report,) = reports([killed(10.0)], records, (0.0, 20.0))
    assert report.errors == 0


def test_each_fault_is_counted_up_to_the_next():
    lost = [record(10.2, 10.3, status="UNAVAILABLE"), record(20.2, 20.3, status="INTERNAL")]
    found = reports([stopped(20.1, 20.2), killed(10.1)], [*steady(0, 30), *lost], (0.0, 30.0))
    assert [report.at_s for report in found] == [10.1, 20.1]
    assert [report.errors for report in found] == [1, 1]
    assert found[0].completed_per_s_after == pytest.approx(9 / 8.6)  # recovered at 11.5, until 20.1
    assert found[1].completed_per_s_before == pytest.approx(9 / 8.6)
    assert found[1].completed_per_s_after == pytest.approx(9 / 8.5)


def test_what_could_not_be_done_is_said_and_ends_nobody_elses_time():
    failed = stopped(15.0, 15.0 + 1, error="it is not on this host", target="")
    first, second = reports([killed(10.0), failed], steady(0, 20), (0.0, 20.0))
    assert first.completed_per_s_after == pytest.approx(10 / 9.5)
    assert (second.error, second.errors, second.stall_s, second.completed_per_s_before) == (
        "it is not on this host",
        0,
        None,
        None,
    )


def test_recovery_needs_a_quiet_second_and_the_faults_end():
    failing = [record(s, s + 0.6, status="UNAVAILABLE") for s in (10, 11, 12)]
    assert recovery(killed(9.8), steady(9, 20), 20.0) == 10.5
    assert recovery(killed(9.8), [*steady(9, 20), *failing], 20.0) == 13.5
    assert recovery(stopped(9.8, 15.2), steady(9, 20), 20.0) == 15.5
    assert recovery(killed(9.8), steady(9, 20), 10.2) is None
    assert recovery(killed(19.8), steady(9, 20), 20.0) is None


def test_silence_counts_from_when_somebody_waits():
    nobody_there = [record(9.0, 9.5, 9.5), record(14.0, 16.0, 16.0)]
    assert longest_stall(nobody_there, 10.0, 16.0, came_back=True) == 2.0
    somebody_there = [*nobody_there, record(9.0, 10.5, status="UNAVAILABLE")]
    assert longest_stall(somebody_there, 10.0, 16.0, came_back=True) == 6.0
    assert longest_stall(nobody_there[:1], 10.0, 16.0, came_back=False) == 0.0
    assert longest_stall([record(9.0, 15.0, 10.1, 11.0, status=CUT)], 10.0, 16.0, came_back=False) is None
