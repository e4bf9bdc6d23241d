"""The run's course: did it become stationary, where was it silent, what happened in each second."""

import numpy as np
import pytest
from simulated_queue import answer, open_load, poisson_queue

from tramontane.client.loadtest.judging.stationarity import stationary
from tramontane.client.loadtest.judging.timeline import seconds, stalls
from tramontane.client.loadtest.plan import Conduct, Load
from tramontane.client.loadtest.record import CUT
from tramontane.client.loadtest.result import Stall


def share_called_stationary(use, servers, runs=60):
    """Of runs with 1,000 requests in a window of 100 s after 20 s of warm-up, at this load of an M/M/c queue."""
    random = np.random.default_rng(7)
    load = open_load(120.0, 20.0, rate=10.0)
    found = [
        stationary(
            poisson_queue(random, rate=10.0, service_s=use * servers / 10, servers=servers, duration_s=120.0),
            load,
            (20.0, 120.0),
        )
        for _ in range(runs)
    ]
    assert None not in found
    return sum(found) / runs


@pytest.mark.parametrize("servers", [1, 8])
def test_a_queue_is_stationary_below_its_capacity_only(servers):
    assert share_called_stationary(0.7, servers) == 1
    assert share_called_stationary(0.9, servers) >= 0.95
    assert share_called_stationary(1.2, servers) <= 0.1
    assert share_called_stationary(1.5, servers) == 0


def steady(count, seconds_each, rate=10.0):
    return [answer(number / rate, number / rate + 0.1, number / rate + seconds_each) for number in range(count)]


def test_a_warm_up_shorter_than_a_request_is_not_stationary():
    """10 requests a second of 8 s each: none ends before 8 s, until when 80 pile up."""
    records = steady(400, 8.0)
    assert stationary(records, open_load(20.0, 0.0), (0.0, 20.0)) is False
    assert stationary(records, open_load(40.0, 10.0), (10.0, 40.0)) is True


@pytest.mark.parametrize("duration_s", [3.0, 30.0])
def test_a_server_that_ends_nothing_is_not_stationary(duration_s):
    found = stationary(steady(300, 1000.0), open_load(duration_s), (0.0, duration_s))
    assert found is (None if duration_s < 5 else False)


@pytest.mark.parametrize("kind", ["closed", "ramp", "steps", "trace"])
def test_nothing_is_said_where_the_load_decides(kind):
    load = Load(kind=kind, duration_s=30.0, warmup_s=0.0, seed=0)
    assert stationary(steady(300, 0.5), load, (0.0, 30.0)) is None


def test_nothing_is_said_of_few_requests():
    assert stationary(steady(29, 0.5, rate=1.0), open_load(29.0), (0.0, 29.0)) is None


def stream(sent_s, times_s, ended_s=None, **changes):
    ended_s = times_s[-1] if ended_s is None else ended_s
    changes |= {"message_times_s": tuple(times_s), "message_tokens": (1,) * len(times_s)}
    return answer(sent_s, sent_s, ended_s, **changes)


EVEN = np.arange(1, 200) / 50
"""A message each 20 ms, from 0.02 s to 3.98 s."""


def test_a_server_that_speaks_all_the_time_does_not_stall():
    assert stalls([stream(0, EVEN)], (0, 10)) == ()
    assert stalls([stream(0, EVEN), stream(60, EVEN + 60)], (0, 100)) == (), "nobody waits in between"


def test_silence_in_mid_stream_is_a_stall():
    broken = stream(0, [*EVEN, *(EVEN + 6)])
    assert stalls([broken], (0, 20)) == (Stall(start_s=EVEN[-1], end_s=EVEN[0] + 6),)
    assert stalls([broken], (15, 20)) == (), "before the window"
    others = stream(3, [3.5, 4.5, 5.4, 6.1])
    assert stalls([broken, others], (0, 20)) == (), "another was served"


@pytest.mark.parametrize("status", ["UNAVAILABLE", CUT])
def test_a_failure_does_not_end_a_silence(status):
    reset = stream(0, EVEN, 9.0, status=status)
    assert stalls([reset], (0, 20)) == (Stall(start_s=EVEN[-1], end_s=9.0),)


def test_a_long_prefill_is_no_stall_unless_it_is_beyond_the_usual():
    usual = [stream(10 * place, 10 * place + 0.4 + EVEN) for place in range(5)]  # TTFT 0.42 s: up to 2.1 s
    assert stalls([*usual, stream(90, 92.0 + EVEN)], (0, 100)) == ()
    assert stalls([*usual, stream(90, 93.0 + EVEN)], (0, 100)) == (Stall(start_s=90, end_s=93.02),)


def test_in_mid_stream_the_usual_prefill_is_no_excuse():
    usual = [stream(10 * place, 10 * place + 1.0 + EVEN) for place in range(5)]  # TTFT 1.02 s: up to 5.1 s
    assert stalls([*usual, stream(90, 92.0 + EVEN)], (0, 100)) == ()
    assert len(stalls([*usual, stream(90, [90.5, 92.5])], (0, 100))) == 1


@pytest.mark.parametrize(("status", "silences"), [("OK", 0), ("UNAVAILABLE", 1)])
def test_a_good_end_is_a_sign_of_life(status, silences):
    """One request ends 0.8 s after the last message, the next message comes 0.8 s after that."""
    ending, going_on = stream(0, [0.5, 1.0], 1.8, status=status), stream(0, [0.5, 1.0, 2.6])
    assert len(stalls([ending, going_on, stream(30, 30 + EVEN)], (0, 10))) == silences


def test_a_slow_readers_pause_is_its_own():
    slow = stream(0, [*EVEN, *(EVEN + 6)], conduct=Conduct.SLOW)
    assert stalls([slow], (0, 20)) == ()


def test_no_records_no_stalls():
    assert stalls([], (0, 10)) == ()


def test_each_second():
    records = [
        answer(0.0, 0.5, 2.5, tokens=3),  # messages at 0.5, 1.5 and 2.5 s
        answer(0.2, 0.9, 0.9),
        answer(1.0, 1.0, 1.2, status="UNAVAILABLE", message_times_s=(), message_tokens=(), completion_tokens=0),
        answer(1.0, 1.0, 1.2, status="INVALID_ARGUMENT", conduct=Conduct.BAD, message_times_s=(), message_tokens=()),
        answer(2.0, 9.0, 9.5),
    ]
    first, second, third = seconds(records, 2.5)
    assert (first.arrived, first.ended, first.open, first.output_tokens) == (2, 1, 1, 2)
    assert first.ttft_ms == pytest.approx(600)
    assert (second.arrived, second.ended, second.failed, second.open, second.output_tokens) == (2, 2, 1, 1, 1)
    assert second.ttft_ms is None
    assert (third.at_s, third.ended, third.open) == (2, 1, 1)
    assert seconds([], 0) == ()
