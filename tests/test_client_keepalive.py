"""Idle and silent connections, counted at the server. Pings leave a client once a second at most."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from cut_wire import CutWire
from fake_pipeline import serving
from fake_server import FakeServer, Plan, delta, hold, started

from tramontane.client import AsyncClient, Client, ClientOptions, errors
from tramontane.cluster import gateway
from tramontane.cluster.servicer import Servicer
from tramontane.cluster.site import LINK_SILENCE_S
from tramontane.protos import serving_pb2


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


def test_a_client_waits_as_long_as_a_service_goes_on():
    """A ping may fall into a pause's first moment; a peer that is dead is noticed within the time that is stated."""
    options = ClientOptions()
    assert options.keepalive_timeout_s >= LINK_SILENCE_S
    assert options.keepalive_s + options.keepalive_timeout_s == 75
    arguments = dict(options.arguments("a.example:1", watch_health=True))
    assert arguments["grpc.http2.ping_timeout_ms"] == arguments["grpc.keepalive_timeout_ms"] == 45_000


async def test_a_pause_of_the_server_costs_the_pause(server):
    """As 30 s by default: shorter than a ping may take, longer than the time between two of them."""
    server.plans += [events_around(3.0)] * 2
    options = ClientOptions(keepalive_s=1, keepalive_timeout_s=5)
    wire = CutWire(server.target)
    with wire as detour:
        client, waiting = Client(detour, options), AsyncClient(detour, options)
        streams = client.stream("a", timeout_s=40), waiting.stream("a", timeout_s=40)
        assert (next(streams[0]).text, (await anext(streams[1])).text) == ("a", "a")
        wire.hold(True)
        await asyncio.sleep(2.5)
        wire.hold(False)
        assert ((await asyncio.to_thread(next, streams[0])).text, (await anext(streams[1])).text) == ("b", "b")
        client.close()
        await waiting.close()


def events_around(pause_s: float) -> Plan:
    """Two tokens with so much time between them."""

    def plan(request, context):
        yield serving_pb2.GenerateEvent(started=started(request), delta=delta(0, ord("a")))
        time.sleep(pause_s)
        yield serving_pb2.GenerateEvent(delta=delta(1, ord("b")))

    return plan


@pytest.mark.skipif("TRAMONTANE_SLOW_TESTS" not in os.environ, reason="takes 35 s: set TRAMONTANE_SLOW_TESTS=1")
def test_a_server_that_is_stopped_for_30_s_loses_no_stream_of_a_client_as_it_comes():
    script = "import fake_server, sys; s = fake_server.FakeServer().__enter__(); print(s.target, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, Client(process.stdout.readline().strip()) as client:
        stream = client.stream("a", max_tokens=3000, timeout_s=100)
        ids = [next(stream).token_ids[0]]
        process.send_signal(signal.SIGSTOP)
        time.sleep(30)
        process.send_signal(signal.SIGCONT)
        ids += [delta.token_ids[0] for delta in stream]
        assert ids == list(range(98, 3098))
        process.stdin.close()


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
