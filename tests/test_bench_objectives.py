"""Objectives: how they are written, and when a request and a run keep them."""

import pytest
from simulated_queue import answer

from tramontane.client.loadtest.judging.objectives import met, parse_objective, verdicts
from tramontane.client.loadtest.record import CUT
from tramontane.client.loadtest.result import Objective


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ttft:p95<1s", Objective(measure="ttft", q=0.95, limit_ms=1000)),
        ("itl:p99.9<100ms", Objective(measure="itl", q=0.999, limit_ms=100)),
        (" TPOT : p50 < 0.5 s ", Objective(measure="tpot", q=0.5, limit_ms=500)),
    ],
)
def test_an_objective_is_read(text, wanted):
    assert parse_objective(text) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ttft<1s", "MEASURE:pQUANTILE<LIMIT"),
        ("tpot:mean<50ms", "ttft:p95<1s"),
        ("ttft:p95<1", "ms or s"),
        ("latency:p95<1s", "ttft, itl, itl_per_token, tpot, e2el, e2el_per_token"),
        ("ttft:p100<1s", "below p100"),
        ("ttft:p95<0ms", "above 0"),
    ],
)
def test_a_wrong_objective_is_told_what_is_allowed(text, told):
    with pytest.raises(ValueError, match=told):
        parse_objective(text)


@pytest.mark.parametrize("measure", ["ttft", "itl", "tpot", "e2el"])
@pytest.mark.parametrize("changes", [{"status": "UNAVAILABLE"}, {"status": CUT}, {"message_times_s": ()}])
def test_a_request_without_an_answer_met_nothing(measure, changes):
    assert not met(answer(0, 0.1, 0.1, **changes), parse_objective(f"{measure}:p50<9s"))


def test_a_request_is_judged_by_its_own_value():
    assert met(answer(0, 0.999, 2), parse_objective("ttft:p95<1s"))
    assert not met(answer(0, 1.0, 2), parse_objective("ttft:p95<1s"))
    assert met(answer(0, 5, 5), parse_objective("tpot:p95<1ms")), "a single token has no TPOT to break"


def test_one_gap_in_twenty_may_be_longer_than_p95():
    times_s = [*(0.01 * step for step in range(20)), 5.0]  # 19 gaps of 10 ms, one of 4.8 s
    record = answer(0, 0, 5, tokens=21, message_times_s=tuple(times_s))
    assert met(record, parse_objective("itl:p95<20ms"))
    assert not met(record, parse_objective("itl:p99<20ms"))


def test_failed_requests_are_infinitely_late():
    records = [answer(0, 0.2, 0.2)] * 96 + [answer(0, 0.1, 0.1, status="RESOURCE_EXHAUSTED")] * 4
    p95, p99 = verdicts(records, [parse_objective("ttft:p95<1s"), parse_objective("ttft:p99<1s")], is_open=True)
    assert (p95.value_ms, p95.met) == (200, True)
    assert (p99.value_ms, p99.met) == (None, False)


def test_a_failed_request_weighs_as_many_gaps_as_another_has():
    records = [answer(0, 0, 1, tokens=11)] * 9 + [answer(0, 0, 0, status=CUT)]
    p89, p91 = verdicts(records, [parse_objective("itl:p89<1s"), parse_objective("itl:p91<1s")], is_open=True)
    assert (p89.met, p91.met) == (True, False)
