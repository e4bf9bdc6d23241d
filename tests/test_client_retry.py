"""What a full server refuses is tried again when it says, within the deadline; what else it says stands."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest
from fake_server import FakeServer, refuse
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from tramontane.client import AsyncClient, Cancelled, Client, ClientOptions, ResourceExhausted

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def full(milliseconds: int):
    return refuse(FULL, "too many wait", RetryInfo(retry_delay=Duration(nanos=milliseconds * 10**6)))


def ask(server, **options):
    with Client(server.target, ClientOptions(**options)) as client:
        return client.generate("ab", max_tokens=3, timeout_s=5)


async def ask_async(server, **options):
    async with AsyncClient(server.target, ClientOptions(**options)) as client:
        return await client.generate("ab", max_tokens=3, timeout_s=5)


BOTH = pytest.mark.parametrize("ask", [ask, lambda *a, **o: asyncio.run(ask_async(*a, **o))], ids=["sync", "async"])


@BOTH
def test_a_refused_request_waits_as_it_is_told_and_is_answered(server, ask):
    server.plans += [full(150), full(50)]
    begin = time.monotonic()
    assert ask(server).text == "cde"
    assert time.monotonic() - begin >= 0.2
    assert len({seen.request.request_id for seen in server.seen}) == 1
    assert [seen.method for seen in server.seen].count("GenerateStream") == 3


@BOTH
def test_what_remains_of_the_deadline_goes_with_the_next_try(server, ask):
    server.plans += [full(300)]
    ask(server)
    first, second = (seen.remaining_s for seen in server.seen)
    assert second <= first - 0.25, "gRPC rounds deadlines up, to 10 ms at this size"


@BOTH
def test_not_at_all_where_it_is_off(server, ask):
    server.plans += [full(10)]
    with pytest.raises(ResourceExhausted) as refused:
        ask(server, retry_refused=False)
    assert refused.value.retry_after_s == 0.01


@BOTH
def test_a_hint_beyond_the_deadline_is_an_error_at_once(server, ask):
    server.plans += [refuse(FULL, "too many wait", RetryInfo(retry_delay=Duration(seconds=30)))]
    with pytest.raises(ResourceExhausted, match="too many wait"):
        ask(server)


@BOTH
def test_a_refusal_without_a_hint_stands(server, ask):
    server.plans += [refuse(FULL, "the message is too large")]
    with pytest.raises(ResourceExhausted, match="too large"):
        ask(server)


def test_closing_a_stream_ends_its_wait(server):
    server.plans += [refuse(FULL, "full", RetryInfo(retry_delay=Duration(seconds=15)))]
    with Client(server.target) as client:
        stream = client.stream("a", timeout_s=20)
        threading.Timer(0.3, stream.close).start()
        with pytest.raises(Cancelled):
            next(stream)
    assert len(server.seen) == 1


async def test_closing_an_async_stream_ends_its_wait(server):
    server.plans += [refuse(FULL, "full", RetryInfo(retry_delay=Duration(seconds=15)))]
    async with AsyncClient(server.target) as client:
        stream = client.stream("a", timeout_s=20)
        asyncio.get_running_loop().call_later(0.3, stream.close)
        with pytest.raises(Cancelled):
            await anext(stream)


async def test_a_cancelled_task_stops_waiting(server):
    server.plans += [refuse(FULL, "full", RetryInfo(retry_delay=Duration(seconds=15)))]
    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(client.generate("a", timeout_s=20))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
