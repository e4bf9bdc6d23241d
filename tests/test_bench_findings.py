"""Which runs are invalid, which missed their objectives, and what their reader is told."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_queue import answer, open_load

from tramontane.client.loadtest.finding import Severity, worst_first
from tramontane.client.loadtest.judging.findings import findings_of_figures, lag_findings
from tramontane.client.loadtest.judging.measures import measure
from tramontane.client.loadtest.judging.objectives import parse_objective
from tramontane.client.loadtest.judging.quantiles import distribution
from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.record import INCOMPLETE, STREAM_ERROR, UNREADABLE
from tramontane.client.loadtest.result import GeneratorLag, Stall

NO_LAG = GeneratorLag(send=None, read=None)


def spread(median, top, count=2000):
    """Half at the median, 2 % at the top."""
    return distribution(np.repeat([median, top], [count * 49 // 50, count // 50]))


LATENCIES = {"ttft": spread(80, 300), "itl": spread(20, 60)}


@pytest.mark.parametrize(
    ("send", "read", "invalid"),
    [
        (spread(1, 20), None, 0),
        (spread(9, 20), None, 1),  # a ninth of the median TTFT
        (spread(1, 31), None, 1),  # the p99 only
        (None, spread(1.9, 1.9), 0),
        (None, spread(1, 5.9), 0),
        (None, spread(1, 6.1), 1),  # a tenth of the ITL, not of the TTFT
        (None, spread(1, 31), 2),
    ],
)
def test_a_lag_of_more_than_a_tenth_spoils_the_figures(send, read, invalid):
    found = lag_findings(GeneratorLag(send=send, read=read), LATENCIES)
    assert [each.severity for each in found] == [Severity.INVALID] * invalid


def test_lag_below_2_ms_is_what_timers_do():
    assert lag_findings(GeneratorLag(send=spread(1, 1.9), read=spread(1, 1.9)), {"ttft": spread(2, 2)}) == ()


def told(records, load=None, objectives=(), is_stationary=True, silences=()):
    load = load or open_load(10.0)
    measured = measure(records, load, (0.0, 10.0), [parse_objective(text) for text in objectives])
    found = findings_of_figures(measured, load, NO_LAG, is_stationary, silences)
    return [(str(each.severity), each.text) for each in worst_first(found)]


GOOD = [answer(1, 1.1, 1.5, tokens=4)] * 300
FAILED = answer(1, 1, 1.1, status="UNAVAILABLE", message_times_s=(), message_tokens=(), completion_tokens=0)


def test_a_good_run_has_no_findings():
    assert told(GOOD, objectives=["ttft:p95<1s"]) == []


@pytest.mark.parametrize("records", [[], [FAILED] * 3])
def test_a_run_without_a_completed_request_is_invalid(records):
    assert told(records)[0][0] == "invalid"


def refused(status):
    return answer(1, 1, 1.1, status=status, message_times_s=(), message_tokens=(), completion_tokens=0)


def test_a_server_that_refuses_most_has_figures_all_the_same():
    """One that fails most has none: what it would have answered, nobody knows."""
    found = told([*GOOD[:100], *[refused("RESOURCE_EXHAUSTED")] * 150, *[refused("HTTP_429")] * 50], is_stationary=None)
    assert [severity for severity, _ in found] == ["note"]
    assert found[0][1].startswith("200 of 300 requests failed (200 refused) and 0 were cut")
    assert told([*GOOD[:100], *[FAILED] * 150])[0][0] == "invalid"


def test_an_answer_that_could_not_be_decoded_makes_the_run_invalid():
    unreadable = replace(FAILED, status=UNREADABLE, error="JSON is malformed")
    found = told([*GOOD, unreadable, unreadable])
    assert found[0] == ("invalid", "2 answers could not be decoded; the first: JSON is malformed")
    early = replace(unreadable, intended_s=-1.0)
    assert told([*GOOD, early])[0][0] == "invalid", "in the warm-up too"


@pytest.mark.parametrize("status", [STREAM_ERROR, INCOMPLETE, "HTTP_400", "HTTP_429"])
def test_a_peers_failure_is_a_failed_request_and_no_more(status):
    assert [severity for severity, _ in told([*GOOD, refused(status)])] == ["note"]


def test_missed_objectives_come_first():
    found = told([*GOOD, *[FAILED] * 30], objectives=["e2el:p50<400ms", "ttft:p95<1s"])
    assert [severity for severity, _ in found] == ["missed", "missed", "note"]
    assert found[0][1] == "e2el p50 < 400 ms was missed: it is 500.0 ms"
    assert found[1][1] == "ttft p95 < 1000 ms was missed: it is infinite, with failed requests"
    assert found[2][1].startswith("30 of 330 requests failed")


def test_the_reader_is_told():
    empty = answer(1, 1, 1.1, message_times_s=(), message_tokens=(), completion_tokens=0)
    uncounted = answer(1, 1.1, 1.5, tokens=4, completion_tokens=0)
    silences = [Stall(start_s=2.0, end_s=3.5), Stall(start_s=5.0, end_s=8.0)]
    found = told([*GOOD[:20], empty, uncounted], None, ["ttft:p90<1s"], False, silences)
    assert {severity for severity, _ in found} == {"note"}
    for part in (
        "brought no token",
        "did not count the tokens of 1",
        "judged by 22 requests",
        "never became stationary",
    ):
        assert any(part in text for _, text in found), part
    assert any("2 stalls" in text and "3.0 s from 5.0 s" in text for _, text in found)


def test_a_closed_loop_is_told_that_it_hides_overload():
    load = Load(kind="closed", duration_s=10.0, warmup_s=0.0, seed=0, users=4)
    assert [text for _, text in told(GOOD, load, ["ttft:p50<1ms"])] == [
        "a closed loop slows down with the server and hides overload: no verdict on objectives"
    ]
