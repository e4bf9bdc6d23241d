"""The driver on a virtual clock: what is sent when, whoever answers late; what becomes of each request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
import virtual_time

from tramontane.client.loadtest.driver import LEAVE_AT_ONCE_S, Pace, drive
from tramontane.client.loadtest.plan import Ask, Conduct, Load, Plan
from tramontane.client.loadtest.record import CUT, LEFT, OK, Record
from tramontane.client.loadtest.target import Answer, Leave


@dataclass
class Scripted:
    """Answers each request after `first_s` with `tokens` messages, `gap_s` apart; one at a time where it is serial."""

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


def test_requests_leave_when_they_are_due_however_many_are_open():
    target = Scripted(first_s=4.0)
    records = drive_to_end(open_plan(0.5, 0.75, 2.0), target)
    assert target.sent_at_s == [0.5, 0.75, 2.0]
    assert [record.sent_s - record.intended_s for record in records] == pytest.approx([0, 0, 0])
    assert records[0].message_times_s == pytest.approx((4.5, 4.51, 4.52))
    assert records[0].ended_s == pytest.approx(4.52)


def test_a_stall_does_not_slow_the_schedule():
    target = Scripted(stall=(1.0, 3.0))
    records = drive_to_end(open_plan(*(index / 10 for index in range(40)), duration_s=4.0), target)
    assert target.sent_at_s == pytest.approx([index / 10 for index in range(40)])
    # Each request that was due in the stall waited from then on for its end.
    waited = [record.message_times_s[0] - record.intended_s for record in records]
    assert waited[10] == pytest.approx(2.0)
    assert waited[20] == pytest.approx(1.0)
    assert waited[35] == pytest.approx(0.1)


def test_each_user_of_a_closed_loop_waits_for_its_answer():
    target = Scripted(first_s=0.98)
    records = drive_to_end(closed_plan(users=2, asks=3, duration_s=2.5), target)
    assert target.sent_at_s == pytest.approx([0, 0, 1, 1, 2, 2])
    # Three asks, six requests: they begin again.
    assert [record.number for record in records] == [0, 0, 1, 1, 2, 2]
    assert all(record.ok for record in records)


def test_what_is_open_after_the_drain_is_cut():
    target = Scripted(first_s=1.0, gap_s=6.0)
    first, last = drive_to_end(open_plan(0.0, 9.5), target, drain_s=4.0)
    assert first.status == OK
    assert last.status == CUT
    assert last.ended_s == pytest.approx(14.0)
    assert last.message_times_s == pytest.approx((10.5,))
    assert target.closed_at_s[1] == pytest.approx(14.0)


def test_a_stopped_run_reports_what_was_open():
    records: list[Record] = []

    async def stopped() -> None:
        driving = asyncio.create_task(
            drive(open_plan(0.0, 1.0, 8.0), Scripted(first_s=3.0), Pace(origin=0.0, drain_s=9.0), records.append)
        )
        await asyncio.sleep(3.5)
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving

    virtual_time.run(stopped())
    assert [(record.number, record.status) for record in records] == [(0, OK), (1, CUT)]


@pytest.mark.parametrize(("cancel_after", "left_at_s"), [(1, 0.1), (2, 0.11), (0, LEAVE_AT_ONCE_S)])
def test_a_client_that_leaves(cancel_after, left_at_s):
    target = Scripted()
    (record,) = drive_to_end(open_plan(0.0, conduct=Conduct.CANCEL, cancel_after=cancel_after), target)
    assert record.status == LEFT
    assert target.closed_at_s[0] == pytest.approx(left_at_s)
    assert len(record.message_times_s) == cancel_after


def test_a_slow_reader_pauses_after_each_message():
    (record,) = drive_to_end(open_plan(0.0, conduct=Conduct.SLOW, pause_s=1.0), Scripted())
    assert record.message_times_s == pytest.approx((0.1, 1.11, 2.12))


def test_a_record_says_which_conduct_it_was():
    plan = open_plan(0.0, 0.1)
    plan = replace(plan, asks=(plan.asks[0], replace(plan.asks[1], conduct=Conduct.BAD)))
    assert [record.conduct for record in drive_to_end(plan, Scripted())] == [Conduct.NORMAL, Conduct.BAD]
