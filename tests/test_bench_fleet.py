"""The generator's processes against a real server in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from fake_server import FakeServer, delta, events, hold, refuse, started
from google.rpc.error_details_pb2 import BadRequest

from tramontane.client.loadtest.generator.fleet import Fleet, split
from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct, Load, Plan
from tramontane.client.loadtest.record import CUT, LEFT, OK, PROTOCOL, Record
from tramontane.protos import serving_pb2


def plan_of(*asks: Ask, duration_s: float = 1.0, gap_s: float = 0.05) -> Plan:
    return Plan(
        load=Load(kind="constant", duration_s=duration_s, warmup_s=0.0, seed=0),
        asks=asks,
        arrivals_s=tuple(index * gap_s for index in range(len(asks))),
    )


def asks_of(count: int, **fields) -> list[Ask]:
    return [Ask(number=number, prompt=(100 + number,), max_tokens=3, **fields) for number in range(count)]


async def run(plan: Plan, target: str, *, workers: int = 1, drain_s: float = 5.0, stop_after_s: float | None = None):
    records: list[Record] = []
    async with Fleet(plan, TargetOptions(address=target, model="counting"), workers=workers, drain_s=drain_s) as fleet:
        fleet.start()
        collecting = asyncio.create_task(fleet.collect(records.append))
        if stop_after_s is not None:
            await asyncio.sleep(stop_after_s)
            fleet.stop()
        usage = await collecting
    return sorted(records, key=lambda record: record.number), usage


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def test_parts_of_a_plan_are_dealt_like_cards():
    first, second = split(plan_of(*asks_of(5)), 2)
    assert [ask.number for ask in first.asks] == [0, 2, 4]
    assert second.arrivals_s == (0.05, pytest.approx(0.15))
    closed = Plan(load=Load(kind="closed", users=5, duration_s=1, warmup_s=0, seed=0), asks=tuple(asks_of(4)))
    assert [part.load.users for part in split(closed, 2)] == [3, 2]


async def test_every_request_is_sent_and_recorded_once(server):
    records, usage = await run(plan_of(*asks_of(12)), server.target, workers=2)
    assert [record.number for record in records] == list(range(12))
    assert {record.status for record in records} == {OK}
    assert records[3].token_ids == (104, 105, 106)
    assert records[3].text == "hij"
    assert records[3].message_tokens == (1, 1, 1)
    assert records[3].prompt_tokens == 1
    assert records[3].server.prefill_ms == 20.0
    assert records[3].finish_reason == "length"
    assert all(
        record.intended_s <= record.sent_s <= record.message_times_s[0] <= record.ended_s < 5 for record in records
    )
    assert len(server.generated) == 12
    assert len(usage.read_lag) > 10
    assert 0 < usage.cores < 2


async def test_what_went_wrong_is_recorded(server):
    server.plans += [
        refuse(grpc.StatusCode.UNAVAILABLE, "loading"),
        refuse(grpc.StatusCode.INVALID_ARGUMENT, "too long", BadRequest()),
        events(
            lambda request: serving_pb2.GenerateEvent(started=started(request), delta=delta(0, 7)),
            lambda request: serving_pb2.GenerateEvent(delta=delta(2, 9)),
        ),
        hold(after=2),
    ]
    records, _ = await run(plan_of(*asks_of(4), gap_s=0.2), server.target, drain_s=0.5)
    assert [record.status for record in records] == ["UNAVAILABLE", "INVALID_ARGUMENT", PROTOCOL, CUT]
    assert "offset 2 after 1" in records[2].error
    assert records[3].completion_tokens == 2
    assert len(server.generated) == 4  # refused ones are not sent again
    assert all(seen.ended.wait(10) for seen in server.generated)


async def test_conduct_reaches_the_server(server):
    leaving, *churning = asks_of(4)
    server.plans.append(hold(after=3))
    asks = [
        replace(leaving, conduct=Conduct.CANCEL, cancel_after=2),
        *(replace(ask, conduct=Conduct.CHURN) for ask in churning),
    ]
    records, _ = await run(plan_of(*asks), server.target)
    assert [record.status for record in records] == [LEFT, OK, OK, OK]
    assert server.generated[0].ended.wait(10)
    peers = [seen.peer for seen in server.generated]
    assert len(set(peers)) == 4  # those who churn have a connection each


async def test_a_stopped_run_keeps_what_it_has(server):
    server.plans += [hold(after=1)] * 100
    records, _ = await run(plan_of(*asks_of(40), duration_s=60.0), server.target, workers=2, stop_after_s=0.8)
    assert 1 <= len(records) < 40
    assert {record.status for record in records} == {CUT}


async def test_a_server_that_is_not_there_is_named():
    with FakeServer() as gone:
        target = gone.target
    with pytest.raises(ConnectionError, match=target):
        await run(plan_of(*asks_of(1)), target)
