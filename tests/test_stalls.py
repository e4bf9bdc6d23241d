"""How long the event loop has stood still."""

from __future__ import annotations

import time

from calls import eventually
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.stalls import Longest, LoopWatch


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), min_size=1), st.integers(0, 100))
def test_the_longest_ever_and_of_the_last_minute(steps, later):
    longest, now, added = Longest(), 0, []
    for pause, milliseconds in steps:
        now += pause
        longest.add(now, milliseconds / 1e3)
        added.append((now, milliseconds / 1e3))
    assert longest.ever_s == max(seconds for _, seconds in added)
    recent = [seconds for at, seconds in added if at >= now + later - 60]
    assert longest.recent_s(now + later) == max(recent, default=0.0)


async def test_a_loop_that_is_held_up_is_seen():
    watch = LoopWatch()
    watch.start()
    time.sleep(0.3)  # noqa: ASYNC251  (it is the stall)
    await eventually(lambda: watch.all.ever_s > 0.25)
    assert watch.all.ever_s >= watch.own.ever_s > 0.0
    watch.stop()


async def test_time_in_which_others_had_the_cores_is_not_our_own(monkeypatch):
    watch = LoopWatch()
    watch.start()
    queued = iter(range(1000))
    monkeypatch.setattr(watch._queueing, "seconds", lambda: float(next(queued)))
    watch._timer.cancel()
    watch._again()
    time.sleep(0.3)  # noqa: ASYNC251  (it is the stall)
    await eventually(lambda: watch.all.ever_s > 0.25)
    watch.stop()
    assert watch.own.ever_s == 0.0
