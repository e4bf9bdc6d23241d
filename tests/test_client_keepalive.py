"""Idle and silent connections, counted at the server. Pings leave a client once a second at most."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import ExitStack

import pytest
from cut_wire import CutWire
from fake_pipeline import serving
from fake_server import FakeServer, hold

from tramontane.client import AsyncClient, Client, ClientOptions, errors
from tramontane.cluster import gateway
from tramontane.cluster.servicer import Servicer


def allowing(seconds: float) -> list[tuple[str, int]]:
    """A server that closes a connection at the third ping that comes sooner than this after another."""
    return [("grpc.http2.min_ping_interval_without_data_ms", round(seconds * 1000))]


def test_an_idle_client_lives_where_it_pings_no_more_than_it_may():
    with ExitStack() as opened:
        servers = [opened.enter_context(FakeServer(options=allowing(seconds))) for seconds in (0.5, 10.0)]
        options = ClientOptions(keepalive_s=1)
        clients = [opened.enter_context(Client(server.target, options)) for server in servers]
        for pause_s in (5, 0):
            for client in clients:
                client.generate("a", max_tokens=1)
            time.sleep(pause_s)
        assert [len({seen.peer for seen in server.generated}) for server in servers] == [1, 2]


def test_a_client_pings_less_often_than_our_gateways_allow():
    assert ClientOptions().keepalive_s >= 1.5 * gateway.MIN_PING_INTERVAL_S


@pytest.mark.skipif("TRAMONTANE_SLOW_TESTS" not in os.environ, reason="takes 6 minutes: set TRAMONTANE_SLOW_TESTS=1")
@pytest.mark.timeout(600)
async def test_an_idle_client_lives_for_minutes(monkeypatch):
    """Our gateway and our client as they are: gRPC's own policy would have closed the connection by then."""
    seen = []
    whole = Servicer._generate

    async def counted(self, message, context, send) -> None:
        seen.append(context.peer())
        await whole(self, message, context, send)

    monkeypatch.setattr(Servicer, "_generate", counted)
    async with serving() as (_, target), AsyncClient(target) as client:
        await client.generate("a summer", max_tokens=1)
        await asyncio.sleep(350)
        await client.generate("a summer", max_tokens=1)
    assert len(set(seen)) == 1


async def test_a_server_whose_machine_is_gone_is_found_before_the_deadline(server):
    server.plans += [hold(1)] * 2
    options = ClientOptions(keepalive_s=1, keepalive_timeout_s=0.5)
    wire = CutWire(server.target)
    with wire as detour:
        client, waiting = Client(detour, options), AsyncClient(detour, options)
        streams = client.stream("a", timeout_s=40), waiting.stream("a", timeout_s=40)
        assert (next(streams[0]).text, (await anext(streams[1])).text) == ("a", "a")
        wire.cut()
        with pytest.raises(errors.Unavailable):
            await asyncio.to_thread(next, streams[0])
        with pytest.raises(errors.Unavailable):
            await anext(streams[1])
        client.close()
        await waiting.close()
