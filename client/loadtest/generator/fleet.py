"""The generator's processes: starts the workers, hands each its part of the plan, and collects what they measured."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import msgspec

from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.generator.worker import Done, Ended, Failed, Message, Order, Ready, Start
from tramontane.client.loadtest.plan import Plan
from tramontane.client.loadtest.record import Record

LINE_LIMIT_BYTES = 2**28
"""Of one message of a worker: a record holds a whole completion."""
HEAD_START_S = 0.2
"""Between the word to start and the start: every worker has read it by then."""
_PARTING_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the workers used of this machine, and how late they were. Times are seconds from the run's start."""

    read_lag: tuple[tuple[float, float], ...]
    """When, and by how much an event loop ran behind, in seconds."""
    cores: float
    """CPU seconds a second of all workers over the measured window."""
    dead_workers: int = 0
    """Which ended before their time, with all that was open at them."""


class Fleet:
    """Worker processes around one plan. An async context manager: leaving its block ends every worker.

    async with Fleet(plan, target, workers=2, drain_s=60) as fleet:
        origin = fleet.start()
        usage = await fleet.collect(records.append)
    """

    def __init__(self, plan: Plan, target: TargetOptions, *, workers: int, drain_s: float) -> None:
        self._orders = [Order(part, target, drain_s) for part in split(plan, workers)]
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        """Start all workers and wait until each has reached the server.

        Raises:
            ConnectionError: one could not; says why.
        """
        try:
            for order in self._orders:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "tramontane.client.loadtest.generator.worker",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE_LIMIT_BYTES,
                )
                self._processes.append(process)
                _tell(process, order)
            for process in self._processes:
                message = await _hear(process)
                if not isinstance(message, Ready):
                    raise ConnectionError(message.error if isinstance(message, Failed) else "a worker ended early")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._end()

    def start(self) -> float:
        """Let the run begin; returns when, on the event loop's clock."""
        origin = asyncio.get_running_loop().time() + HEAD_START_S
        for process in self._processes:
            _tell(process, Start(origin))
        return origin

    def stop(self) -> None:
        """Cut what is open and end early; `collect` then returns soon."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    async def collect(self, report: Callable[[Record], None]) -> Usage:
        """Hand on every record as it comes, until all workers are done, or dead."""
        listening = await asyncio.gather(*(_listen(process, report) for process in self._processes))
        ends = [end for end in listening if end is not None]
        return Usage(
            dead_workers=len(listening) - len(ends),
            read_lag=tuple(sample for end in ends for sample in end.read_lag),
            cores=sum(_slope(end.cpu_s) for end in ends),
        )

    async def _end(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), _PARTING_S)
            except TimeoutError:
                process.kill()
                await process.wait()


def split(plan: Plan, workers: int) -> list[Plan]:
    """One part a worker, dealt like cards, so that each gets the same mixture.

    Arrivals 0 1 2 3 4 for two workers are 0 2 4 and 1 3; five users are 3 and 2.
    """
    parts = []
    for index in range(workers):
        load = plan.load
        if load.users is not None:
            load = replace(load, users=len(range(index, load.users, workers)))
        parts.append(Plan(load=load, asks=plan.asks[index::workers], arrivals_s=plan.arrivals_s[index::workers]))
    return parts


async def _listen(process: asyncio.subprocess.Process, report: Callable[[Record], None]) -> Done | None:
    """The worker's last words; None where it died before."""
    while True:
        match await _hear(process):
            case Ended(record):
                report(record)
            case Done() as done:
                return done
            case None:
                return None
            case other:
                raise AssertionError(f"a worker says {other} in the middle of a run")


async def _hear(process: asyncio.subprocess.Process) -> Message | None:
    """The worker's next message; None when there will be no more."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    return msgspec.json.decode(line, type=Message) if line else None


def _tell(process: asyncio.subprocess.Process, message: Order | Start) -> None:
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(message) + b"\n")


def _slope(readings: list[tuple[float, float]]) -> float:
    """CPU seconds a second between the first reading and the last."""
    if len(readings) < 2 or readings[-1][0] <= readings[0][0]:
        return 0.0
    return (readings[-1][1] - readings[0][1]) / (readings[-1][0] - readings[0][0])
