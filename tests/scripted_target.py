"""A target whose delays are written down, and plans for it: with a virtual clock every latency is known beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import virtual_time

from tramontane.client.loadtest.generator.driver import Pace, drive
from tramontane.client.loadtest.generator.target import Answer, Leave
from tramontane.client.loadtest.plan import Ask, Load, Plan
from tramontane.client.loadtest.record import LEFT, OK, Record


@dataclass
class Scripted:
    """Answers each request after `first_s` with `tokens` messages, `gap_s` apart."""

    first_s: float = 0.1
    gap_s: float = 0.01
    tokens: int = 3
    stall: tuple[float, float] = (0.0, 0.0)
    """No message leaves between these times."""
    sent_at_s: list[float] = field(default_factory=list)
    closed_at_s: dict[int, float] = field(default_factory=dict)

    async def send(self, ask, on_tokens) -> Answer:
        loop = asyncio.get_running_loop()
        self.sent_at_s.append(round(loop.time(), 6))
        try:
            for index in range(self.tokens):
                await asyncio.sleep(self.gap_s if index else self.first_s)
                if self.stall[0] <= loop.time() < self.stall[1]:
                    await asyncio.sleep(self.stall[1] - loop.time())
                await on_tokens(1)
        except Leave:
            return Answer(status=LEFT)
        finally:
            self.closed_at_s[ask.number] = round(loop.time(), 6)
        return Answer(status=OK, completion_tokens=self.tokens)


def open_plan(*arrivals_s: float, duration_s: float = 10.0, **fields) -> Plan:
    asks = tuple(
        Ask(number=number, prompt=(1,), max_tokens=3, **{"seed": number, **fields}) for number in range(len(arrivals_s))
    )
    return Plan(
        load=Load(kind="constant", duration_s=duration_s, warmup_s=0.0, seed=0), asks=asks, arrivals_s=arrivals_s
    )


def closed_plan(users: int, asks: int, duration_s: float) -> Plan:
    return Plan(
        load=Load(kind="closed", duration_s=duration_s, warmup_s=0.0, seed=0, users=users),
        asks=tuple(Ask(number=number, prompt=(1,), max_tokens=3) for number in range(asks)),
    )


def drive_to_end(plan: Plan, target: object, drain_s: float = 5.0) -> list[Record]:
    records: list[Record] = []
    virtual_time.run(drive(plan, target, Pace(origin=0.0, drain_s=drain_s), records.append))
    return sorted(records, key=lambda record: (record.number, record.intended_s))
