"""Many calls at once, and strangers who reset theirs or send them in half: refusals are ours, others are served."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from calls import Code, ask, details_of, eventually, failure, generate, stub_of
from fake_pipeline import FakePipeline, serving, tiny_model, tiny_tokenizer
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from raw_http2 import RawConnection

from tramontane.cluster import gateway as gateways
from tramontane.cluster import interceptors
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.steps import Steps
from tramontane.stages.microbatch import Int32Array

TOKENS = ("sesame-of-ann-0001", "sesame-of-bob-0002")


@pytest.fixture
def guarded(tmp_path) -> Entrance:
    (tmp_path / "tokens").write_text("\n".join(TOKENS))
    return Entrance(token_file=str(tmp_path / "tokens"))


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def ends_of(calls) -> Counter[str]:
    """How many calls ended how. A refusal must be ours: typed, and with a hint."""
    ends: Counter[str] = Counter()
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, grpc.aio.AioRpcError):
            if answer.code() == Code.RESOURCE_EXHAUSTED:
                assert error_details_pb2.RetryInfo in details_of(answer), answer.details()
            ends[answer.code().name] += 1
        else:
            ends["OK"] += 1
    return ends


@pytest.mark.parametrize(("count", "connections"), [(1500, 1), (4000, 1), (4000, 8)])
async def test_honest_calls_at_once_are_all_served(count, connections):
    async with serving() as (_, target), AsyncExitStack() as opened:
        stubs = [
            await opened.enter_async_context(stub_of(target, use_local_subchannel_pool=1)) for _ in range(connections)
        ]
        calls = [stubs[index % connections].Generate(ask()) for index in range(count)]
        assert await ends_of(calls) == {"OK": count}


async def test_more_calls_than_a_connection_has_streams_are_all_served(monkeypatch):
    """A stream that the client has done with is not yet gone from the gateway, and the next comes meanwhile."""
    monkeypatch.setattr(gateways, "STREAMS_OF_A_CONNECTION", 256)
    monkeypatch.setattr(gateways, "ENDING_STREAMS", 128)
    async with serving() as (_, target), stub_of(target) as stub:
        assert await ends_of(stub.Generate(ask()) for _ in range(1500)) == {"OK": 1500}


@pytest.mark.parametrize("count", [1500, 4000])
async def test_beyond_a_user_s_share_calls_are_refused_at_once_with_a_hint(monkeypatch, count):
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 800)
    pipeline = FakePipeline()
    pipeline.running.clear()
    async with serving(pipeline) as (gateway, target), stub_of(target) as stub:
        calls = [asyncio.ensure_future(generate(stub, "a summer")) for _ in range(count)]
        await eventually(lambda: sum(call.done() for call in calls) == count - 400)
        assert gateway.stats().open_calls == 400
        assert gateway.stats().refused_calls == count - 400
        pipeline.running.set()
        assert await ends_of(calls) == {"OK": 400, "RESOURCE_EXHAUSTED": count - 400}
        assert len(pipeline.submitted) == 400
        await eventually(lambda: gateway.stats().open_calls == 0)
        assert await ends_of(generate(stub, "a summer") for _ in range(400)) == {"OK": 400}


async def test_a_user_has_one_share_whatever_the_number_of_connections(monkeypatch, guarded):
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 8)
    pipeline = FakePipeline()
    pipeline.running.clear()
    own_connection = {"use_local_subchannel_pool": 1}
    async with (
        serving(pipeline, entrance=guarded) as (_, target),
        stub_of(target, **own_connection) as first,
        stub_of(target, **own_connection) as second,
    ):
        ann = [stub.Generate(ask(), metadata=bearer(TOKENS[0])) for stub in (first, second) * 2]
        await eventually(lambda: len(pipeline.open) == 4)
        for stub, scheme in ((first, "Bearer"), (second, "bearer ")):
            error = await failure(stub.Generate(ask(), metadata=(("authorization", f"{scheme} {TOKENS[0]}"),)))
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert "4 calls of yours are open" in error.details()
        bob = [second.Generate(ask(), metadata=bearer(TOKENS[1])) for _ in range(2)]
        await eventually(lambda: len(pipeline.open) == 6)
        pipeline.running.set()
        assert await ends_of((*ann, *bob)) == {"OK": 6}


async def test_tokens_make_no_users_where_none_is_needed(monkeypatch, guarded):
    """Health's are not looked at."""
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 8)
    async with serving(entrance=guarded) as (gateway, target), grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        wish = health_pb2.HealthCheckRequest()
        watches = [stub.Watch(wish, metadata=bearer(f"made-up-sesame-{number:04}")) for number in range(6)]
        await eventually(lambda: gateway.stats().refused_calls == 2)
        assert gateway.stats().open_calls == 4
        for watch in watches:
            watch.cancel()


async def test_tokens_make_no_users_where_none_is_checked(monkeypatch):
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 8)
    pipeline = FakePipeline()
    pipeline.running.clear()
    async with serving(pipeline) as (gateway, target), stub_of(target) as stub:
        calls = [stub.Generate(ask(), metadata=bearer(f"made-up-sesame-{number:04}")) for number in range(6)]
        await eventually(lambda: gateway.stats().refused_calls == 2)
        pipeline.running.set()
        assert await ends_of(calls) == {"OK": 4, "RESOURCE_EXHAUSTED": 2}


async def test_reflection_counts_too(monkeypatch):
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 8)
    async with serving() as (gateway, target), grpc.aio.insecure_channel(target) as channel:
        calls = [reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo() for _ in range(6)]
        for call in calls:
            wish = reflection_pb2.ServerReflectionRequest(list_services="")
            await asyncio.wait([asyncio.ensure_future(call.write(wish))])
        await eventually(lambda: gateway.stats().refused_calls == 2)
        assert gateway.stats().open_calls == 4
        for call in calls:
            call.cancel()
        await eventually(lambda: gateway.stats().open_calls == 0)
        assert gateway._guard._receiving.taken == 0


async def test_bystanders_of_rapid_resets_are_served():
    """Many more come in than may be pending, while the event loop stands still, so that it has to deal with all."""
    async with serving() as (gateway, target), stub_of(target) as stub:
        await generate(stub, "a summer")
        strangers = [threading.Thread(target=reset_calls, args=(target, gateways.PENDING_CALLS)) for _ in range(2)]
        for stranger in strangers:
            stranger.start()
        for stranger in strangers:
            stranger.join()
        assert await ends_of(generate(stub, "a summer") for _ in range(20)) == {"OK": 20}
        await eventually(lambda: gateway.stats().open_calls == 0)


def reset_calls(target: str, count: int) -> None:
    connection = RawConnection(target)
    for _ in range(0, count, 500):
        connection.open_and_reset(500)
        connection.listen(0.0)
    connection.close()


async def test_metadata_is_bounded_and_up_to_the_bound_always_taken():
    async with serving() as (_, target), stub_of(target) as stub:
        for _ in range(20):
            await stub.Generate(ask(), metadata=(("junk", "x" * (gateways.METADATA_BYTES - 1000)),))
        error = await failure(stub.Generate(ask(), metadata=(("junk", "x" * gateways.METADATA_BYTES),)))
        assert error.code() == Code.RESOURCE_EXHAUSTED
        await generate(stub, "a summer")


CONNECTIONS, STREAMS, LENGTH = 4, 25, 4_000_000


@dataclass(frozen=True)
class Halves:
    """Connections that are all open, with calls that each lack the end of their message, as far as they were let in."""

    connections: list[RawConnection]

    @property
    def sent(self) -> int:
        return sum(connection.sent for connection in self.connections)

    def ends(self) -> list[bytes]:
        """Of the calls that the server has ended by now."""
        for connection in self.connections:
            connection.listen(0.5)
        return [end for connection in self.connections for end in connection.ends.values()]


@asynccontextmanager
async def half_sent(target: str, metadata=()) -> AsyncIterator[Halves]:
    def send() -> Halves:
        connections = [RawConnection(target, metadata) for _ in range(CONNECTIONS)]
        for connection in connections:
            for _ in range(STREAMS):
                connection.call(LENGTH)
            connection.send_all_but_one_byte()
        for connection in connections:  # whom others left no room
            connection.send_all_but_one_byte()
        return Halves(connections)

    halves = await asyncio.to_thread(send)
    try:
        yield halves
    finally:
        for connection in halves.connections:
            connection.close()


async def test_half_sent_messages_take_bounded_memory(monkeypatch):
    """A window's worth came in of most, as many whole ones as may be read at a time, and the rest was refused."""
    monkeypatch.setattr(interceptors, "OPEN_CALLS", 120)
    monkeypatch.setattr(interceptors, "RECEIVING_BYTES", 0)
    places = interceptors.FEWEST_PLACES // 2
    async with serving() as (gateway, target), stub_of(target) as stub:
        async with half_sent(target) as halves:
            assert len(await asyncio.to_thread(halves.ends)) == CONNECTIONS * STREAMS - 60
            assert gateway.stats().open_calls == 60
            assert halves.sent > places * (LENGTH - 1)
            assert halves.sent < places * LENGTH + CONNECTIONS * STREAMS * gateways.WINDOW_BYTES
        await eventually(lambda: gateway.stats().open_calls == 0)
        assert gateway._guard._receiving.taken == 0
        await generate(stub, "a summer")


async def test_a_stranger_without_a_token_gets_nothing_but_windows_in(guarded):
    async with serving(entrance=guarded) as (gateway, target), half_sent(target) as halves:
        assert len(await asyncio.to_thread(halves.ends)) == CONNECTIONS * STREAMS
        assert halves.sent <= CONNECTIONS * STREAMS * gateways.WINDOW_BYTES
        assert gateway.stats().open_calls == 0


async def test_others_are_read_beside_a_user_who_sends_in_half(monkeypatch, guarded):
    monkeypatch.setattr(interceptors, "RECEIVING_BYTES", 0)
    async with (
        serving(entrance=guarded) as (_, target),
        stub_of(target) as stub,
        half_sent(target, bearer(TOKENS[0])),
    ):
        error = await failure(stub.Generate(ask("x" * 200_000), metadata=bearer(TOKENS[1]), timeout=20))
        assert error.code() == Code.INVALID_ARGUMENT


async def test_a_message_that_does_not_come_whole_in_time_gives_its_place_up(monkeypatch):
    monkeypatch.setattr(interceptors, "RECEIVE_S", 0.2)
    monkeypatch.setattr(interceptors, "RECEIVING_BYTES", 0)
    async with serving() as (gateway, target), stub_of(target) as stub, half_sent(target) as halves:
        await eventually(lambda: gateway.stats().open_calls == 0)
        ends = await asyncio.to_thread(halves.ends)
        assert len(ends) == CONNECTIONS * STREAMS
        assert any(b"the request has not come whole within 0.2 s" in end for end in ends)
        assert gateway._guard._receiving.taken == 0
        await generate(stub, "a summer")


async def test_a_call_without_a_request_is_told_so():
    async with serving() as (_, target), grpc.aio.insecure_channel(target) as channel:
        error = await failure(channel.stream_unary("/tramontane.v1.Serving/Generate")(iter(())))
        assert (error.code(), error.details()) == (Code.INVALID_ARGUMENT, "the call brought no request")


class Gated:
    """A tokenizer of 50 steps a text, each of which waits for the test; whose they are is the text's first word."""

    eos_id = 2

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.allowed = threading.Semaphore(0)

    def encode_in_steps(self, text: str, *, add_bos: bool, most: int) -> Steps[Int32Array]:
        yield
        for _ in range(50):
            assert self.allowed.acquire(timeout=30)
            self.steps.append(text.split()[0])
            yield
        return np.array([5], np.int32)

    def __getattr__(self, name: str) -> object:
        return getattr(tiny_tokenizer(), name)


@pytest.mark.parametrize("tokens", [TOKENS, (TOKENS[0], TOKENS[0])])
async def test_a_user_s_large_texts_leave_others_their_turns(guarded, tokens):
    """From many connections; who shares the flood's token shares its turns."""
    gated = Gated()
    async with (
        serving(model=tiny_model(tokenizer=gated), entrance=guarded) as (gateway, target),
        AsyncExitStack() as opened,
    ):
        stubs = [await opened.enter_async_context(stub_of(target, use_local_subchannel_pool=1)) for _ in range(9)]
        large = ask("flood " * 1000)
        flood = [stub.Generate(large, metadata=bearer(tokens[0])) for stub in stubs[:8] for _ in range(5)]
        await eventually(lambda: gateway.stats().tokenizing_bytes > 40 * 6000)
        bystander = stubs[8].Generate(ask("bystander " * 1000), metadata=bearer(tokens[1]))
        await eventually(lambda: gateway.stats().tokenizing_bytes > 40 * 6000 + 10_000)
        gated.allowed.release(10_000)
        assert await ends_of([bystander, *flood]) == {"OK": 41}
        floods_before = gated.steps.index("bystander")
        assert (floods_before < 10) == (tokens[0] != tokens[1])
