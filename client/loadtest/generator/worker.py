"""One worker of the generator: takes its part of a plan on stdin, sends it, and writes to stdout what came of it.

Every line is one JSON value:

    in   Order                        what to send, and to whom
    out  Ready | Failed               connected, or why not
    in   Start                        when the run begins, on the clock that all processes of the machine share
    out  Ended, Ended, ...            a record as soon as its request has ended
    out  Done                         the rest: lag and CPU time

When stdin ends, the worker cuts what is open and ends: so a worker never outlives its parent, and a run can be stopped
early without losing what it has measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from typing import TypeAlias

import msgspec

from tramontane.client.loadtest.generator.driver import Pace, drive
from tramontane.client.loadtest.generator.lag import LagSampler
from tramontane.client.loadtest.generator.target import Target, TargetOptions, open_target
from tramontane.client.loadtest.plan import Plan
from tramontane.client.loadtest.record import Record


class Order(msgspec.Struct, frozen=True):
    """What a worker has to do."""

    plan: Plan
    target: TargetOptions
    drain_s: float


class Start(msgspec.Struct, frozen=True):
    """When the run begins."""

    origin: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The server answers."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker cannot take part."""

    error: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A request has ended."""

    record: Record


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The worker has ended."""

    read_lag: list[tuple[float, float]]
    """`LagSampler.samples`."""
    cpu_s: list[tuple[float, float]]
    """When, and the process's CPU time by then: at the window's start and end."""


Message: TypeAlias = Ready | Failed | Ended | Done


def main() -> None:
    """Serve one order."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each open HTTP request is a file
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    asyncio.run(_work(order))


async def _work(order: Order) -> None:
    try:
        target = open_target(order.target)
        try:
            await target.describe()  # connects, too
            _say(Ready())
            await _take_part(order, target)
        finally:
            await target.close()
    except (ConnectionError, ValueError) as error:
        _say(Failed(str(error)))


async def _take_part(order: Order, target: Target) -> None:
    line = await asyncio.to_thread(sys.stdin.buffer.readline)
    if not line:
        return  # the run was given up before it began
    pace = Pace(origin=msgspec.json.decode(line, type=Start).origin, drain_s=order.drain_s)
    cpu_s: list[tuple[float, float]] = []

    async def read_cpu_times() -> None:
        for at_s in (order.plan.load.warmup_s, order.plan.load.duration_s):
            await pace.until(at_s)
            cpu_s.append((pace.now(), time.process_time()))

    driving = asyncio.create_task(drive(order.plan, target, pace, lambda record: _say(Ended(record))))
    _cancel_when_stdin_ends(driving)
    clock = asyncio.create_task(read_cpu_times())
    with LagSampler(pace.now) as lag, contextlib.suppress(asyncio.CancelledError):
        await driving
    if not clock.done():
        clock.cancel()
        cpu_s.append((pace.now(), time.process_time()))
    _say(Done(lag.samples, cpu_s))


def _cancel_when_stdin_ends(task: asyncio.Task[None]) -> None:
    loop = asyncio.get_running_loop()

    def watch() -> None:
        # Not by sys.stdin, whose lock a thread that still waits would hold when the interpreter ends.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _say(message: Message) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
