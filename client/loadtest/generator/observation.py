"""One run as it happens: starts the generator, reads the server's counters at the window's ends, inflicts faults.

describe -> workers connect -> start -> (window begins: counters) ... faults ... (window ends: counters) -> drain
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tramontane.client.loadtest.generator.driver import Pace
from tramontane.client.loadtest.generator.faults import Fault, FaultOutcome, carry_out
from tramontane.client.loadtest.generator.fleet import Fleet, Usage
from tramontane.client.loadtest.generator.target import Target, TargetOptions
from tramontane.client.loadtest.plan import Plan
from tramontane.client.loadtest.progress import Progress
from tramontane.client.loadtest.record import Record
from tramontane.client.types import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """Who sends."""

    target: TargetOptions
    workers: int
    drain_s: float
    """How long requests may go on after the last arrival; then they are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Counters at one moment of the run."""

    at_s: float
    stats: Stats | None
    """None where the server does not tell."""
    own_cpu_s: float
    """CPU time of this process, which collects what the workers measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """All that was seen of one run."""

    date: str
    records: tuple[Record, ...]
    """In the order in which they ended."""
    usage: Usage
    before: Reading
    """At the measured window's start and, next, at its end."""
    after: Reading
    at_rest: Stats | None
    """After the last request."""
    faults: tuple[FaultOutcome, ...]
    until_s: float
    """When arrivals ended: the plan's duration, or less where the run was stopped."""
    stopped: bool
    """By its user, before its time."""


async def observe(
    plan: Plan,
    generator: Generator,
    target: Target,
    faults: Sequence[Fault],
    progress: Progress,
    stopping: asyncio.Event,
) -> Observation:
    """Carry the plan out. When `stopping` is set the run ends early, and what was measured until then counts.

    Raises:
        ConnectionError: the server cannot be reached at the start, or a worker died.
        ValueError: a fault comes after the run.
    """
    for fault in faults:
        if fault.at_s >= plan.load.duration_s:
            raise ValueError(f"fault {fault} comes after the run, which lasts {plan.load.duration_s:g} s")
    known = await target.stats() if faults else None
    if faults and known is None:
        raise ConnectionError("faults need GetStats to say which processes there are, and it does not answer")
    async with Fleet(plan, generator.target, workers=generator.workers, drain_s=generator.drain_s) as fleet:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        watch = _Watch(plan, target, Pace(origin=fleet.start(), drain_s=generator.drain_s))
        records: list[Record] = []
        until_s = plan.load.duration_s
        collecting = asyncio.create_task(fleet.collect(records.append))
        watching = asyncio.create_task(watch.read_counters())
        stop = asyncio.create_task(stopping.wait())
        inflicting = [
            asyncio.create_task(carry_out(each, known, target.stats, watch.pace.now)) for each in faults if known
        ]
        others = [watching, stop, *inflicting]
        try:
            with progress.watching(plan, watch.pace, records):
                await asyncio.wait({collecting, stop}, return_when=asyncio.FIRST_COMPLETED)
                if stopping.is_set():
                    until_s = min(until_s, watch.pace.now())
                    watching.cancel()
                    await watch.read()
                    fleet.stop()
                usage = await collecting
                if not stopping.is_set():
                    await asyncio.wait({watching})  # its last reading may still be on its way
                    await asyncio.gather(*inflicting)  # one that stops a process may last beyond the run
        finally:
            for task in (collecting, *others):
                task.cancel()
            await asyncio.gather(collecting, *others, return_exceptions=True)
        return Observation(
            date=date,
            records=tuple(records),
            usage=usage,
            before=watch.readings[0],
            after=watch.readings[-1],
            at_rest=await target.stats(),
            faults=tuple(task.result() for task in inflicting if not task.cancelled()),
            until_s=until_s,
            stopped=stopping.is_set(),
        )


@dataclass(slots=True)
class _Watch:
    """What happens beside the load."""

    plan: Plan
    target: Target
    pace: Pace
    readings: list[Reading] = field(default_factory=list)

    async def read_counters(self) -> None:
        for at_s in (self.plan.load.warmup_s, self.plan.load.duration_s):
            await self.pace.until(at_s)
            await self.read()

    async def read(self) -> None:
        at_s, own_cpu_s = self.pace.now(), time.process_time()
        self.readings.append(Reading(at_s=at_s, stats=await self.target.stats(), own_cpu_s=own_cpu_s))
