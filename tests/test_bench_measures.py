"""The measures by their definitions, the window's edges, and coordinated omission, all on plain numbers."""

import math

import numpy as np
import pytest
from simulated_queue import THE_EXAMPLE, answer, open_load, poisson_queue, queue

from tramontane.client.loadtest.judging.latency import tokens_by_message, values_ms
from tramontane.client.loadtest.judging.measures import measure
from tramontane.client.loadtest.judging.objectives import parse_objective
from tramontane.client.loadtest.judging.quantiles import quantile
from tramontane.client.loadtest.plan import Conduct, Load
from tramontane.client.loadtest.record import CUT, LEFT, ServerTimings

NOTHING = {"message_times_s": (), "message_tokens": (), "completion_tokens": 0}


def measured(records, load=None, objectives=()):
    load = load or open_load(10.0)
    return measure(records, load, (load.warmup_s, load.duration_s), [parse_objective(text) for text in objectives])


def test_the_example_of_a_record():
    found = {name: values_ms(THE_EXAMPLE, name) for name in ("ttft", "itl", "itl_per_token", "tpot", "e2el")}
    assert found == {
        "ttft": pytest.approx((101,)),
        "itl": pytest.approx((50,)),
        "itl_per_token": pytest.approx((25, 25)),
        "tpot": pytest.approx((25.5,)),
        "e2el": pytest.approx((152,)),
    }


def test_one_token_has_no_tpot_and_no_gap():
    record = answer(0, 0.1, 0.1)
    assert values_ms(record, "tpot") == values_ms(record, "itl") == values_ms(record, "itl_per_token") == ()


def test_nothing_is_defined_of_an_answer_without_tokens_but_its_end():
    record = answer(0, 0, 0.2, message_times_s=(), message_tokens=(), completion_tokens=0)
    assert values_ms(record, "e2el") == (200,)
    assert not any(values_ms(record, name) for name in ("ttft", "itl", "itl_per_token", "tpot", "e2el_per_token"))


@pytest.mark.parametrize("message_tokens", [(1, 1, 1), (4, 1, 2), (1, 5, 1)])
def test_gaps_per_token_are_one_fewer_than_tokens_and_add_up(message_tokens):
    record = answer(0, 1, 2, tokens=3, message_tokens=message_tokens, completion_tokens=sum(message_tokens))
    gaps = values_ms(record, "itl_per_token")
    assert len(gaps) == sum(message_tokens) - 1
    assert sum(gaps) == pytest.approx(1000)
    assert values_ms(record, "tpot") == pytest.approx([np.mean(gaps)])


def test_http_spreads_the_servers_count_over_the_messages():
    assert tokens_by_message(answer(0, 1, 2, tokens=3, completion_tokens=8)) == (3, 2, 3)
    assert tokens_by_message(answer(0, 1, 2, tokens=3, completion_tokens=0)) == (1, 1, 1)
    assert tokens_by_message(answer(0, 1, 2, tokens=3, completion_tokens=2)) == (1, 1, 1)
    assert values_ms(answer(0, 1, 2, tokens=3, completion_tokens=11), "tpot") == (100,)


def test_requests_count_by_arrival_and_tokens_by_the_time_they_come():
    load = open_load(20.0, 10.0)
    before = answer(9.9, 10.1, 10.5, tokens=5)
    within = answer(10.0, 19.5, 20.5, tokens=3)
    after = answer(20.0, 20.1, 20.2, tokens=2)
    found = measured([after, within, before], load)
    assert found.counts.sent == 1
    assert found.latencies["ttft"].mean == 9500
    assert found.throughput.output_tokens_per_s == pytest.approx(0.6)  # all of the first, and one at 19.5 s
    assert found.throughput.input_tokens_per_s == pytest.approx(2.0)
    assert found.throughput.requests_per_s == pytest.approx(0.1)
    assert found.throughput.tokens_per_message == 1


def test_who_is_counted_and_who_is_judged():
    conducts = [answer(1, 1.5, 2, conduct=conduct) for conduct in Conduct]
    found = measured(conducts)
    assert found.counts.sent == 3
    assert found.latencies["ttft"].count == 2
    assert found.throughput.output_tokens_per_s == pytest.approx(0.5)
    assert found.send_lag.count == 5


def test_ends_by_status():
    statuses = ["OK", "OK", "RESOURCE_EXHAUSTED", CUT, LEFT]
    found = measured([answer(1, 1.5, 2, status=status) for status in statuses]).counts
    assert (found.sent, found.completed, found.failed, found.cut) == (5, 2, 1, 1)
    assert found.by_status == {"OK": 2, "RESOURCE_EXHAUSTED": 1, CUT: 1, LEFT: 1}


def test_refusals_are_counted_and_timed_from_sending():
    records = [
        answer(1, 1.2, 1.5, sent_s=1.1),
        *(
            answer(1, 1, 1.0 + 0.001 * n, sent_s=1.0, status=status, error=f"full {n}", **NOTHING)
            for n, status in ((40, "RESOURCE_EXHAUSTED"), (20, "HTTP_429"), (60, "HTTP_429"))
        ),
        answer(2, 2, 2.1, status="UNAVAILABLE", error="gone", **NOTHING),
        answer(3, 3, 3.1, status="HTTP_429", conduct=Conduct.BAD, **NOTHING),
        answer(3, 3, 3.1, status=CUT, **NOTHING),
    ]
    found = measured(records)
    assert (found.counts.sent, found.counts.completed, found.counts.failed, found.counts.refused) == (6, 1, 4, 3)
    assert (found.counts.broken, found.counts.mostly_unserved) == (2, True)
    assert found.counts.first_errors == {"RESOURCE_EXHAUSTED": "full 40", "HTTP_429": "full 20", "UNAVAILABLE": "gone"}
    assert found.refusals.count == 3
    assert (found.refusals.minimum, found.refusals.maximum) == (pytest.approx(20), pytest.approx(60))
    assert measured(records[:1]).refusals is None


@pytest.mark.parametrize("status", ["RESOURCE_EXHAUSTED", "HTTP_429", "DEADLINE_EXCEEDED", "UNAVAILABLE", CUT, LEFT])
def test_only_what_was_answered_in_full_is_goodput(status):
    """However quickly its first token came."""
    found = measured([answer(1, 1.1, 1.5), answer(1, 1.1, 1.5, status=status)], objectives=["ttft:p95<1s"])
    assert found.throughput.goodput_per_s == pytest.approx(0.1)
    assert found.throughput.goodput_share == 0.5


def test_goodput_misses_the_slow_the_refused_and_the_empty():
    good, slow = answer(1, 1.1, 1.5), answer(1, 3, 3.5)
    refused = answer(1, 1, 1.01, status="RESOURCE_EXHAUSTED", message_times_s=(), message_tokens=())
    empty = answer(1, 1, 1.01, message_times_s=(), message_tokens=(), completion_tokens=0)
    found = measured([good, slow, refused, empty], objectives=["ttft:p95<1s", "e2el:p95<5s"])
    assert found.throughput.goodput_per_s == pytest.approx(0.1)
    assert found.throughput.goodput_share == 0.25
    assert found.empty == 1


@pytest.mark.parametrize("kind", ["closed", "poisson"])
def test_a_closed_loop_has_no_goodput_and_no_verdict(kind):
    load = Load(kind=kind, duration_s=10.0, warmup_s=0.0, seed=0)
    found = measured([answer(1, 1.1, 1.5)], load, ["ttft:p50<1s"])
    assert (found.throughput.goodput_per_s is None) == (kind == "closed")
    assert found.objectives[0].met is (None if kind == "closed" else True)
    assert found.objectives[0].value_ms == pytest.approx(100)


def test_the_split_adds_up():
    server = ServerTimings(queue_ms=10, prefill_ms=40, decode_ms=95)
    record = answer(0, 0.06, 0.152, sent_s=0.002, server=server)
    parts = measured([record, answer(0, 1, 9)]).breakdown
    assert parts.client_lag_ms == pytest.approx(2)
    assert parts.network_ms == pytest.approx(5)
    parts = (parts.client_lag_ms, parts.queue_ms, parts.prefill_ms, parts.decode_ms, parts.network_ms)
    assert sum(parts) == pytest.approx(152)


def test_no_records_have_no_figures():
    found = measured([], objectives=["ttft:p95<1s"])
    assert found.latencies == {}
    assert found.breakdown is found.send_lag is found.throughput.tokens_per_message is None
    assert found.objectives[0].value_ms is None


def test_samples_are_in_order_of_arrival():
    samples = measured([answer(3, 3.2, 3.3, tokens=2), answer(1, 1.1, 1.1)]).samples
    assert samples.arrived_s == (1, 3)
    assert samples.ttfts_ms == (100, 200)
    assert samples.tpots_ms == (None, 100)
    assert samples.itls_ms == ((), (100,))


def test_littles_law_holds_of_a_simulated_queue():
    """Mean requests under way = throughput x mean time each: two roads to one number, and M/M/1's own formula."""
    load = open_load(20_000.0, 100.0)
    records = poisson_queue(np.random.default_rng(5), rate=0.7, service_s=1.0, duration_s=load.duration_s)
    found = measured(records, load)
    assert found.latencies["e2el"].mean / 1000 == pytest.approx(1 / (1 - 0.7), rel=0.15)
    times_s = np.arange(100, 20_000)
    under_way = [
        np.searchsorted(np.sort([getattr(record, name) for record in records]), times_s)
        for name in ("intended_s", "ended_s")
    ]
    by_counting = (under_way[0] - under_way[1]).mean()
    assert by_counting == pytest.approx(found.throughput.requests_per_s * found.latencies["e2el"].mean / 1000, rel=0.05)


def test_coordinated_omission():
    """A server of 1 ms a request stalls for 2 s once in 100 s of 100 requests a second.

    The n-th request due in the stall (from 0) is late by what is left of it, and by those before it in the queue:
    2.001 - 0.01 n + 0.001 n seconds. Of 10,000 requests 100 are slower than the p99, so it is that of n = 100: 1.101 s.
    A closed loop of one user, who waits with the 200 requests that he would have sent, sees one slow request and calls
    p99 1 ms.
    """
    arrivals_s = np.arange(10_000) * 0.01
    services_s = np.full(10_000, 0.001)
    services_s[5_000] += 2.0
    found = measured(queue(arrivals_s, services_s), open_load(100.0, kind="constant", rate=100.0))
    assert found.latencies["ttft"].at(0.99) == pytest.approx(2001 - 9 * 100)

    ready_s, waited_ms = 0.0, []
    for service_s in services_s:
        (record,) = queue([ready_s], [service_s])
        waited_ms += values_ms(record, "ttft")
        ready_s = max(record.ended_s, ready_s + 0.01)
    assert quantile(waited_ms, 0.99) == pytest.approx(1.0)
    assert not math.isclose(max(waited_ms), 1.0)


def test_prompts_whose_length_nobody_told_are_no_zero():
    assert measured([answer(0, 1, 2, prompt_tokens=0)]).throughput.input_tokens_per_s is None
    assert measured([]).throughput.input_tokens_per_s == 0
