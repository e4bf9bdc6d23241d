"""Two readings of the server's counters become shares and means, whatever was replaced between them."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from tramontane.client.loadtest.finding import Severity
from tramontane.client.loadtest.judging import server_view
from tramontane.client.loadtest.judging.server_view import machine, shared_machine, view
from tramontane.client.loadtest.result import ProcessShare, ServerView
from tramontane.client.types import ProcessStats, RouterStats, StageStats, Stats


def process(role: str, name: str, cpu_s: float, pid: int = 7, start_time_s: float = 1000.0) -> ProcessStats:
    return ProcessStats(role=role, name=name, node="n", pid=pid, start_time_s=start_time_s, cpu_s=cpu_s)


def stage(name: str, busy_s: float) -> StageStats:
    return StageStats(name=name, busy_ns=int(busy_s * 1e9), steps=1, tokens=1)


def router(name: str, microbatches: int, tokens: int, preemptions: int = 0) -> RouterStats:
    return RouterStats(
        name=name,
        microbatches=microbatches,
        tokens=tokens,
        prompt_tokens=0,
        completion_tokens=0,
        preemptions=preemptions,
        waiting=0,
        running=0,
        in_flight_microbatches=0,
        kv_blocks_used=(),
        kv_blocks_total=(),
    )


BEFORE = Stats(
    processes=(process("gateway", "0", 1.0), process("stage", "0.0", 10.0), process("router", "0", 5.0)),
    stages=(stage("0.0", 2.0), stage("0.1", 9.0)),
    routers=(router("0", 100, 800, 1),),
)
AFTER = Stats(
    processes=(process("gateway", "0", 1.5), process("stage", "0.0", 16.0), process("router", "0", 6.0)),
    stages=(stage("0.0", 5.0), stage("0.1", 9.0)),
    routers=(router("0", 400, 2000, 3),),
)


def test_readings_are_subtracted():
    assert view(BEFORE, AFTER, 4.0) == ServerView(
        seconds=4.0,
        stage_busy={"0.0": 0.75, "0.1": 0.0},
        microbatches=300,
        rows_per_microbatch=4.0,
        preemptions=2,
        processes=(
            ProcessShare(role="gateway", name="0", cpu_s=0.5, cores=0.125),
            ProcessShare(role="stage", name="0.0", cpu_s=6.0, cores=1.5),
            ProcessShare(role="router", name="0", cpu_s=1.0, cores=0.25),
        ),
    )


def test_nothing_happened():
    idle = view(BEFORE, BEFORE, 4.0)
    assert (idle.microbatches, idle.rows_per_microbatch, idle.preemptions) == (0, None, 0)
    assert {share.cores for share in idle.processes} == set(idle.stage_busy.values()) == {0.0}


def test_all_pipelines_count_together():
    after = replace(AFTER, routers=(*AFTER.routers, router("1", 100, 400)))
    seen = view(BEFORE, after, 4.0)
    assert (seen.microbatches, seen.rows_per_microbatch) == (400, 4.0)


@pytest.mark.parametrize("change", [{"pid": 8}, {"start_time_s": 1003.0}])
def test_a_replaced_process_counts_from_its_start(change):
    """Though its counters are higher than its predecessor's."""
    processes = (process("stage", "0.0", 12.0, **change), process("router", "0", 6.0, **change))
    seen = view(BEFORE, replace(AFTER, processes=processes, stages=(stage("0.0", 2.4),)), 4.0)
    assert seen.stage_busy == {"0.0": 0.6}
    assert (seen.microbatches, seen.rows_per_microbatch) == (400, 5.0)
    assert [share.cpu_s for share in seen.processes] == [12.0, 6.0]


def test_a_clock_that_steps_by_a_second_replaces_nobody():
    shifted = tuple(replace(each, start_time_s=each.start_time_s + 1.0) for each in AFTER.processes)
    assert view(BEFORE, replace(AFTER, processes=shifted), 4.0) == view(BEFORE, AFTER, 4.0)


def test_counters_that_begin_again_never_give_less_than_nothing():
    after = replace(AFTER, stages=(stage("0.0", 1.0), stage("0.1", 10.0)), routers=(router("0", 10, 30, 0),))
    seen = view(BEFORE, after, 4.0)
    assert seen.stage_busy == {"0.0": 0.25, "0.1": 0.25}
    assert (seen.microbatches, seen.rows_per_microbatch, seen.preemptions) == (10, 3.0, 0)


def test_who_came_counts_and_who_went_does_not():
    after = replace(AFTER, processes=(process("gateway", "1", 2.0),), stages=(stage("1.0", 1.0),), routers=())
    seen = view(BEFORE, after, 4.0)
    assert [(share.name, share.cpu_s) for share in seen.processes] == [("1", 2.0)]
    assert (seen.stage_busy, seen.microbatches) == ({"1.0": 0.25}, 0)


def test_nobody_is_busier_than_always():
    assert view(BEFORE, replace(AFTER, stages=(stage("0.0", 6.01),)), 4.0).stage_busy == {"0.0": 1.0}


def test_a_generator_that_takes_more_than_a_tenth_of_its_machine_is_noted():
    assert shared_machine(0.2, 2) == ()
    (finding,) = shared_machine(0.21, 2)
    assert finding.severity is Severity.NOTE
    assert finding.text.startswith("shared machine: the generator used 0.21 of 2 cores (10.5%)")


def test_this_machine_is_described():
    here = machine()
    assert here.processor
    assert here.cores == psutil.cpu_count()
    assert here.memory_gib > 0.1
    assert here.system.startswith("Linux ")


def test_a_processor_is_named_by_the_kernel_or_else_by_python(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 49\nmodel name\t: AMD EPYC: 7R32\n\nprocessor\t: 1\nmodel name\t: x\n"
    )
    assert server_view._processor(cpuinfo) == "AMD EPYC: 7R32"
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert server_view._processor(tmp_path / "none") == "aarch64"
