"""Sends the requests of a plan at the times that the plan says, and records what becomes of each.

An open loop never waits for an answer: every request is a task of its own, started when its time has come, however many
are still open. In a closed loop each user sends the next request when the last one has ended.

Time is the event loop's, so that tests run on a virtual clock.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from tramontane.client.loadtest.generator.target import Answer, Leave, OnTokens, Target
from tramontane.client.loadtest.plan import Ask, Conduct, Load, Plan
from tramontane.client.loadtest.record import CUT, LEFT, UNREADABLE, Record

Report: TypeAlias = Callable[[Record], None]

LEAVE_AT_ONCE_S = 0.02
"""A request that is left at once is left so long after sending, when the server has surely seen it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When the run starts and ends, for everyone who takes part in it."""

    origin: float
    """The run's start on the event loop's clock."""
    drain_s: float
    """How long requests may go on after the last arrival; then they are cut."""

    def now(self) -> float:
        """Seconds since the run's start."""
        return asyncio.get_running_loop().time() - self.origin

    async def until(self, at_s: float) -> None:
        """Sleep until then; not at all where it is over."""
        await asyncio.sleep(max(0.0, at_s - self.now()))


async def drive(plan: Plan, target: Target, pace: Pace, report: Report) -> None:
    """Run the plan to its end; `report` gets each record as soon as its request has ended.

    Cancelling ends all requests; they are reported as CUT.
    """
    open_requests: set[asyncio.Task[None]] = set()

    def start(ask: Ask, due_s: float) -> asyncio.Task[None]:
        task = asyncio.create_task(_request(ask, due_s, target, pace, report))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
        return task

    users: list[asyncio.Task[None]] = []
    try:
        if plan.load.is_open:
            for ask, due_s in zip(plan.asks, plan.arrivals_s, strict=True):
                await pace.until(due_s)
                start(ask, due_s)
        else:
            asks = itertools.cycle(plan.asks)
            users = [asyncio.create_task(_user(asks, plan.load, pace, start)) for _ in range(plan.load.users or 0)]
        await pace.until(plan.load.duration_s)
        if open_requests:
            await asyncio.wait(set(open_requests), timeout=pace.drain_s)
    finally:
        ending = [*users, *open_requests]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


async def _user(asks: Iterator[Ask], load: Load, pace: Pace, start: Callable[[Ask, float], asyncio.Task[None]]) -> None:
    while (ready_s := pace.now()) < load.duration_s:
        await asyncio.wait([start(next(asks), ready_s)])


async def _request(ask: Ask, due_s: float, target: Target, pace: Pace, report: Report) -> None:
    times_s: list[float] = []
    tokens: list[int] = []

    async def on_tokens(count: int) -> None:
        times_s.append(pace.now())
        tokens.append(count)
        if ask.conduct is Conduct.CANCEL and sum(tokens) >= ask.cancel_after:
            raise Leave
        if ask.conduct is Conduct.SLOW:
            await asyncio.sleep(ask.pause_s)

    sent_s = pace.now()
    try:
        if ask.conduct is Conduct.CANCEL and ask.cancel_after == 0:
            answer = await _leave_at_once(target, ask, on_tokens)
        else:
            answer = await target.send(ask, on_tokens)
    except asyncio.CancelledError:
        answer = Answer(status=CUT, error="the run ended first", completion_tokens=sum(tokens))
    except Exception as error:
        # Whatever a server sends, no request may vanish from the figures.
        answer = Answer(status=UNREADABLE, error=f"{type(error).__name__}: {error}", completion_tokens=sum(tokens))
    report(
        Record(
            number=ask.number,
            intended_s=due_s,
            sent_s=sent_s,
            message_times_s=tuple(times_s),
            message_tokens=tuple(tokens),
            ended_s=pace.now(),
            status=answer.status,
            error=answer.error,
            conduct=ask.conduct,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            finish_reason=answer.finish_reason,
            server=answer.server,
            token_ids=answer.token_ids,
            text=answer.text,
        )
    )


async def _leave_at_once(target: Target, ask: Ask, on_tokens: OnTokens) -> Answer:
    try:
        async with asyncio.timeout(LEAVE_AT_ONCE_S):
            return await target.send(ask, on_tokens)
    except TimeoutError:
        return Answer(status=LEFT)
