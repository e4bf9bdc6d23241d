"""Faults on purpose while loading: a process of the service is killed, or stopped for a while.

    kill:stage=0.1@20s           SIGKILL to stage 1 of replica 0, 20 s after the run's start
    stop:router,for=500ms@10     SIGSTOP to the first router, SIGCONT half a second later

The service itself says which processes it has (`GetStats`), and it may be anywhere. So a pid is signalled only where a
process of this host has that pid and began at the very time that the service says.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import psutil

from tramontane.client.loadtest.load.durations import parse_duration
from tramontane.client.types import ProcessStats, Stats

ROLES = ("stage", "router", "gateway")
FORM = "KIND:TARGET[=NAME][,for=TIME]@TIME, such as kill:stage=0.1@20s or stop:router,for=3s@10s"
STOP_FOR_S = 3.0
"""Of a stop that does not say how long: a stopped process is never left behind."""
READ_AHEAD_S = 1.0
"""Before a fault's time the processes are asked for anew, since one may have been replaced."""
TICK_S = 0.02
"""The kernel counts a process's start in hundredths of a second."""

_FORM = re.compile(r"(?P<kind>[^:]*):(?P<role>[^=,@]*)(=(?P<name>[^,@]*))?(,for=(?P<for>[^,@]*))?@(?P<at>[^@]*)")


class Kind(StrEnum):
    """What is done to a process."""

    KILL = "kill"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, as it was asked for."""

    kind: Kind
    role: str
    """One of ROLES."""
    name: str | None
    """`0.1` for stage 1 of replica 0, `0` for router or gateway 0; None: the first of its role."""
    for_s: float
    """How long a STOP lasts; 0 of a KILL."""
    at_s: float
    """Seconds after the run's start."""

    def __str__(self) -> str:
        name = f"={self.name}" if self.name is not None else ""
        lasting = f",for={self.for_s:g}s" if self.kind is Kind.STOP else ""
        return f"{self.kind}:{self.role}{name}{lasting}@{self.at_s:g}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOutcome:
    """A fault that was tried."""

    fault: Fault
    at_s: float
    """When it began, in seconds from the run's start."""
    over_s: float
    """When what was done was over; of a kill, when it was done."""
    target: str = ""
    """Role, name and pid."""
    error: str = ""
    """Why it could not be done, where it could not."""


def parse(text: str) -> Fault:
    """Read a fault as users write it.

    >>> str(parse("stop:gateway@1.5"))
    'stop:gateway,for=3s@1.5s'

    Raises:
        ValueError: it is none; the message says what is allowed.
    """
    parts = _FORM.fullmatch(text)
    if parts is None:
        raise ValueError(f"fault {text!r} is not of the form {FORM}")
    kind, role, name, lasting = parts["kind"], parts["role"], parts["name"], parts["for"]
    if kind not in list(Kind):
        raise ValueError(f"fault {text!r}: the kind is {kind!r}; allowed are {', '.join(Kind)}")
    if role not in ROLES:
        raise ValueError(f"fault {text!r}: the target is {role!r}; allowed are {', '.join(ROLES)}")
    if name is not None and not re.fullmatch(r"\d+\.\d+" if role == "stage" else r"\d+", name):
        allowed = "replica.stage, such as 0.1" if role == "stage" else "a number, such as 0"
        raise ValueError(f"fault {text!r}: the {role}'s name is {name!r}; it must be {allowed}")
    if lasting is not None and kind != Kind.STOP:
        raise ValueError(f"fault {text!r}: only a stop has for=TIME; a kill is for good")
    for_s = 0.0 if kind == Kind.KILL else STOP_FOR_S if lasting is None else _seconds(text, "for", lasting)
    if kind == Kind.STOP and for_s == 0:
        raise ValueError(f"fault {text!r}: for is {lasting}; a stop must last longer than 0 s")
    return Fault(kind=Kind(kind), role=role, name=name, for_s=for_s, at_s=_seconds(text, "the time", parts["at"]))


def find_process(stats: Stats, fault: Fault) -> tuple[ProcessStats, psutil.Process]:
    """The process to signal, as the service tells it and as this host has it: certainly the same one.

    Raises:
        ValueError: the service has no such process, or it is elsewhere or has ended, or it is this process or one that
            this one hangs on.
    """
    told = _choose(stats, fault)
    words = _words(told)
    try:
        process = psutil.Process(told.pid)
        started_s, ended = process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        raise ValueError(f"{words} is not on this host") from None
    if not same_start(started_s, told.start_time_s):
        raise ValueError(f"{words} is not on this host: the process of that pid here began at another time")
    if ended:
        raise ValueError(f"{words} has ended already")
    own = psutil.Process()
    if told.pid <= 1 or process in (own, *own.parents()):
        raise ValueError(f"{words} runs the load itself, or this program hangs on it")
    return told, process


def same_start(one_s: float, other_s: float) -> bool:
    """Whether two readings of one process's start may differ so.

    A start is ticks since the host's boot, plus the boot's time in whole seconds, which the kernel derives from its
    clock: it may step by one where the clock is adjusted between the readings. Nothing between the two is allowed.
    """
    difference = abs(one_s - other_s)
    return difference <= TICK_S or abs(difference - 1.0) <= TICK_S


async def inflict(fault: Fault, stats: Stats, now: Callable[[], float]) -> FaultOutcome:
    """Do it at once. Whatever ends this, a process that it stopped goes on.

    `now` gives seconds since the run's start. What cannot be done is said in the result, since the run goes on.
    """
    at_s = now()
    try:
        told, process = find_process(stats, fault)
        if fault.kind is Kind.KILL:
            process.kill()
        else:
            await _stop(process, fault.for_s)
    except asyncio.CancelledError:
        pass  # the run ends early: what was stopped goes on, and what was done is told
    except (ValueError, psutil.Error) as error:
        return FaultOutcome(fault=fault, at_s=at_s, over_s=at_s, error=str(error))
    return FaultOutcome(fault=fault, at_s=at_s, over_s=now(), target=_words(told))


async def carry_out(
    fault: Fault, known: Stats, read: Callable[[], Awaitable[Stats | None]], now: Callable[[], float]
) -> FaultOutcome:
    """Wait for a fault's time, then `inflict` it.

    `known` is a reading from before the run. `read` takes a newer one; where it says nothing in time, as when another
    fault has stopped the gateway, the older one has to do.
    """
    await asyncio.sleep(fault.at_s - READ_AHEAD_S - now())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(fault.at_s - now()):
            known = await read() or known
    await asyncio.sleep(fault.at_s - now())
    return await inflict(fault, known, now)


async def _stop(process: psutil.Process, for_s: float) -> None:
    process.suspend()
    try:
        await asyncio.sleep(for_s)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it was killed meanwhile
            process.resume()


def _choose(stats: Stats, fault: Fault) -> ProcessStats:
    candidates = sorted(
        (each for each in stats.processes if each.role == fault.role), key=lambda each: _order(each.name)
    )
    for told in candidates:
        if fault.name in (None, told.name):
            return told
    known = ", ".join(each.name for each in candidates) or "none"
    wanted = fault.role if fault.name is None else f"{fault.role} {fault.name}"
    raise ValueError(f"the service has no {wanted}; of that role it has {known}")


def _order(name: str) -> list[int]:
    """Stage 0.10 comes after stage 0.9."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _words(told: ProcessStats) -> str:
    return f"{told.role} {told.name} (pid {told.pid})"


def _seconds(text: str, what: str, time: str) -> float:
    try:
        return parse_duration(time, zero_allowed=True)
    except ValueError:
        raise ValueError(f"fault {text!r}: {what} is {time!r}; it must be a time such as 20s, 500ms or 1.5") from None
