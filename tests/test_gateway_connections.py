"""What a gateway does with connections, counted at the gateway: their age, and pings from both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from calls import Code, eventually, failure, generate, stub_of
from cut_wire import CutWire
from fake_pipeline import FakePipeline, serving

from tramontane.client import AsyncClient
from tramontane.cluster import gateway as gateways
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.servicer import Servicer


@pytest.fixture
def peers(monkeypatch) -> Iterator[list[str]]:
    """The connection of each generation, as its number of port at the client."""
    seen: list[str] = []
    whole = Servicer._generate

    async def counted(self, message, context, send) -> None:
        seen.append(context.peer())
        await whole(self, message, context, send)

    monkeypatch.setattr(Servicer, "_generate", counted)
    return seen


async def test_an_old_client_comes_anew_and_its_stream_goes_on(peers):
    pipeline = FakePipeline(reply=lambda submit: iter(lambda: 300, None), pause_s=0.01)
    entrance = Entrance(max_connection_age_s=0.5)
    async with (
        serving(pipeline, entrance=entrance) as (_, target),
        AsyncClient(target) as client,
        client.stream("a summer", max_tokens=4000) as stream,
    ):
        await anext(stream)
        while len(set(peers)) < 4:  # the stream's own, and three after it
            await client.generate("a summer", max_tokens=1)
            assert pipeline.produced < 3000, "no connection has grown old"
        pipeline.pause_s = 0.0
        tokens = sum([len(delta.token_ids) async for delta in stream])
        assert tokens + 1 >= stream.completion.usage.completion_tokens == 4000


async def test_an_age_of_0_is_never(peers):
    async with serving(entrance=Entrance(max_connection_age_s=0)) as (_, target), AsyncClient(target) as client:
        for _ in range(30):
            await client.generate("a summer", max_tokens=1)
            await asyncio.sleep(0.05)
    assert len(set(peers)) == 1


PINGING = {
    "use_local_subchannel_pool": 1,
    "keepalive_time_ms": 100,
    "http2.max_pings_without_data": 0,
    "keepalive_permit_without_calls": 1,
}
"""A client that pings as often as gRPC lets it, which is once a second."""


@dataclass
class Pinged:
    """A gateway, and two clients that ping it: one without a call, one with a call that does not go on."""

    pipeline: FakePipeline
    idle: Any
    busy: Any

    async def start(self) -> None:
        await generate(self.idle, "a summer")
        self.pipeline.running.clear()
        self.silent = asyncio.ensure_future(generate(self.busy, "a summer"))

    async def end(self) -> None:
        self.pipeline.running.set()
        await generate(self.idle, "a summer")


@asynccontextmanager
async def pinged() -> AsyncIterator[Pinged]:
    pipeline = FakePipeline()
    async with serving(pipeline) as (_, target), stub_of(target, **PINGING) as idle, stub_of(target, **PINGING) as busy:
        yield Pinged(pipeline, idle, busy)


async def test_pings_are_welcome_up_to_a_rate(peers, monkeypatch):
    """With a call under way and without; who pings more often loses the connection."""
    monkeypatch.setattr(gateways, "MIN_PING_INTERVAL_S", 0.5)
    async with pinged() as patient:
        monkeypatch.setattr(gateways, "MIN_PING_INTERVAL_S", 10.0)
        async with pinged() as strict:
            both = (patient, strict)
            await asyncio.gather(*(each.start() for each in both))
            await asyncio.sleep(5)
            await patient.end()
            assert (await patient.silent).finished.usage.completion_tokens == 8
            assert len(set(peers)) == 4, "two of each gateway"
            await strict.end()
            error = await failure(strict.silent)
            assert (error.code(), error.details()) == (Code.UNAVAILABLE, "Too many pings")
            assert len(set(peers)) == 5


async def test_a_client_whose_machine_is_gone_is_found(monkeypatch):
    """It closes nothing; what it had asked for would be computed for ever."""
    monkeypatch.setattr(gateways, "KEEPALIVE_S", 0.3)
    monkeypatch.setattr(gateways, "KEEPALIVE_TIMEOUT_S", 0.3)
    pipeline = FakePipeline()
    pipeline.running.clear()
    async with serving(pipeline) as (_, target):
        wire = CutWire(target)
        with wire as detour:
            client = AsyncClient(detour)
            lost = asyncio.create_task(client.generate("a summer"))
            await eventually(lambda: pipeline.open)
            await asyncio.sleep(1.5)
            assert pipeline.open, "a client that answers pings was taken for gone"
            wire.cut()
            await eventually(lambda: not pipeline.open)
            lost.cancel()
            await client.close()
