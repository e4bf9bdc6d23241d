"""The driver on a virtual clock: what is sent when, whoever answers late; what becomes of each request."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import virtual_time
from scripted_target import Scripted, closed_plan, drive_to_end, open_plan

from tramontane.client.loadtest.generator.driver import LEAVE_AT_ONCE_S, Pace, drive
from tramontane.client.loadtest.plan import Conduct
from tramontane.client.loadtest.record import CUT, LEFT, OK, UNREADABLE, Record


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


def test_a_target_that_breaks_is_an_answer_too():
    """Whatever a server sends, no request may vanish."""

    class Breaking(Scripted):
        async def send(self, ask, on_tokens):
            await on_tokens(1)
            raise RecursionError("too deep")

    (record,) = drive_to_end(open_plan(0.0), Breaking())
    assert record.status == UNREADABLE
    assert record.error == "RecursionError: too deep"
    assert len(record.message_times_s) == 1
