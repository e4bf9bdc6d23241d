"""What the server's own counters say of a time: two readings of `GetStats`, subtracted.

    before  stage 0.0: busy 2.0 s    router 0: 100 microbatches, 800 rows
    after   stage 0.0: busy 5.0 s    router 0: 400 microbatches, 2,000 rows
    4 s     stage 0.0: 75 % busy     300 microbatches of 4 rows

A process that was replaced in between counts from its own start, and one that is gone is left out: what it did in its
last seconds, nobody knows.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias, TypeVar

import psutil

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.result import Machine, ProcessShare, ServerView
from tramontane.client.types import ProcessStats, RouterStats, StageStats, Stats

SHARED_ABOVE = 0.1
"""A generator that takes more of its machine than this may slow a server on the same one, and be slowed by it."""
START_TOLERANCE_S = 2.0
"""Two readings of one start differ by a second where the host's clock was adjusted. A new process has a new pid too."""

Part: TypeAlias = tuple[str, str]
"""Role and name."""
T = TypeVar("T", ProcessStats, StageStats, RouterStats)


def view(before: Stats, after: Stats, seconds: float) -> ServerView:
    """What happened in the `seconds` between two readings."""
    assert seconds > 0, f"{seconds} s between two readings"
    replaced = _replaced(before.processes, after.processes)

    def growth(old: Iterable[T], new: Iterable[T], read: Callable[[T], float]) -> dict[Part, float]:
        """How much a counter of each part grew. One that is lower than before has begun again, too."""
        earlier = {_part(each): read(each) for each in old if _part(each) not in replaced}
        return {
            part: now - was if (was := earlier.get(part, 0)) <= now else now
            for part, now in ((_part(each), read(each)) for each in new)
        }

    busy_ns = growth(before.stages, after.stages, lambda stage: stage.busy_ns)
    microbatches = sum(growth(before.routers, after.routers, lambda router: router.microbatches).values())
    rows = sum(growth(before.routers, after.routers, lambda router: router.tokens).values())
    preemptions = sum(growth(before.routers, after.routers, lambda router: router.preemptions).values())
    cpu_s = growth(before.processes, after.processes, lambda process: process.cpu_s)
    return ServerView(
        seconds=seconds,
        # Readings are answered some milliseconds after they are asked for, so a full stage may come out above 1.
        stage_busy={name: min(ns / 1e9 / seconds, 1.0) for (_, name), ns in busy_ns.items()},
        microbatches=int(microbatches),
        rows_per_microbatch=rows / microbatches if microbatches else None,
        preemptions=int(preemptions),
        processes=tuple(
            ProcessShare(role=role, name=name, cpu_s=used_s, cores=used_s / seconds)
            for (role, name), used_s in cpu_s.items()
        ),
    )


def shared_machine(generator_cores: float, machine_cores: int) -> tuple[Finding, ...]:
    """A note where the generator takes a good part of its machine, so that its server had better be elsewhere."""
    share = generator_cores / machine_cores
    if share <= SHARED_ABOVE:
        return ()
    text = (
        f"shared machine: the generator used {generator_cores:.2f} of {machine_cores} cores ({share:.1%}); "
        "a server on the same machine had only the rest"
    )
    return (Finding(severity=Severity.NOTE, text=text),)


def machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        processor=_processor(Path("/proc/cpuinfo")),
        cores=psutil.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    )


def _replaced(before: Iterable[ProcessStats], after: Iterable[ProcessStats]) -> set[Part]:
    """The parts that another process plays now."""
    earlier = {_part(process): process for process in before}
    return {
        _part(now)
        for now in after
        if (was := earlier.get(_part(now))) is not None
        and ((was.node, was.pid) != (now.node, now.pid) or abs(was.start_time_s - now.start_time_s) > START_TOLERANCE_S)
    }


def _part(each: ProcessStats | StageStats | RouterStats) -> Part:
    match each:
        case ProcessStats():
            return each.role, each.name
        case StageStats():
            return "stage", each.name
        case RouterStats():
            return "router", each.name


def _processor(cpuinfo: Path) -> str:
    """The model's name, as the kernel tells it on most architectures; else what Python knows."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    named = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return next(named, "") or platform.processor() or platform.machine()
