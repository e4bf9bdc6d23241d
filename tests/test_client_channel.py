"""What a client's connections do, counted at the server: pool, retries, health, waiting, message limits."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter

import grpc
import pytest
from fake_server import FakeServer, delta, hold, refuse, started

from tramontane.client import AsyncClient, Client, ClientOptions, Tls, errors
from tramontane.protos import serving_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def peers(server: FakeServer) -> Counter[str]:
    return Counter(seen.peer for seen in server.generated)


def wait_until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("connections", [1, 3])
async def test_n_connections_are_n_and_share_the_calls_evenly(server, connections):
    options = ClientOptions(connections=connections)
    with Client(server.target, options) as client:
        for _ in range(2 * connections):
            client.generate("a", max_tokens=1)
    assert list(peers(server).values()) == [2] * connections
    server.seen.clear()
    async with AsyncClient(server.target, options) as client:
        for _ in range(2 * connections):
            await client.generate("a", max_tokens=1)
    assert list(peers(server).values()) == [2] * connections


def test_clients_of_one_process_do_not_share_a_connection(server):
    with Client(server.target) as one, Client(server.target) as two:
        one.generate("a", max_tokens=1)
        two.generate("a", max_tokens=1)
    assert list(peers(server).values()) == [1, 1]


def test_several_addresses_share_the_calls():
    with FakeServer() as one, FakeServer() as two, Client(f"ipv4:{one.target},{two.target}") as client:
        client.generate("a", max_tokens=1)
        wait_until(lambda: client.generate("a", max_tokens=1) and one.generated and two.generated)
        one.seen.clear()
        two.seen.clear()
        for _ in range(8):
            client.generate("a", max_tokens=1)
        assert (len(one.generated), len(two.generated)) == (4, 4)


def test_a_name_stands_for_its_addresses(server):
    with Client(f"dns:///localhost:{server.target.rpartition(':')[2]}") as client:
        assert client.generate("a", max_tokens=2).text == "bc"


def test_many_streams_need_a_pool():
    """The server takes 4 streams a connection, as others take 100: two connections carry 8, and a ninth waits."""
    limit = [("grpc.max_concurrent_streams", 5)]  # the fifth is the watch on its health
    with FakeServer(options=limit) as server, Client(server.target, ClientOptions(connections=2)) as client:
        for _ in range(2):
            client.generate("a", max_tokens=1)  # calls that wait for a connection start in no order
        server.seen.clear()
        server.plans += [hold(1)] * 9
        streams = [client.stream("a") for _ in range(9)]
        for stream in streams[:8]:
            assert next(stream).text == "a"
        time.sleep(0.3)
        assert sorted(peers(server).values()) == [4, 4]
        streams[0].close()
        assert next(streams[8]).text == "a"
        assert sorted(peers(server).values()) == [4, 5]


def test_calls_go_to_those_that_serve():
    with FakeServer() as serving, FakeServer() as loading:
        loading.set_serving(False)
        with Client(f"ipv4:{loading.target},{serving.target}") as client:
            for _ in range(6):
                client.generate("a", max_tokens=1)
            assert (len(loading.generated), len(serving.generated)) == (0, 6)
            loading.set_serving(True)
            wait_until(lambda: client.generate("a", max_tokens=1) and loading.generated)


async def test_refused_before_its_first_token_a_call_is_tried_again(server):
    server.plans += [refuse(UNAVAILABLE, "loading, 43 %"), refuse(UNAVAILABLE, "loading, 44 %")]
    with Client(server.target) as client:
        assert client.generate("ab", max_tokens=2, request_id="r-1").text == "cd"
    server.plans += [refuse(UNAVAILABLE, "loading, 43 %"), refuse(UNAVAILABLE, "loading, 44 %")]
    async with AsyncClient(server.target) as client:
        assert (await client.generate("ab", max_tokens=2, request_id="r-1")).text == "cd"
    assert [seen.request.request_id for seen in server.generated] == ["r-1"] * 6
    assert len({seen.request.sampling.seed for seen in server.generated[:3]}) == 1


def test_a_long_prompt_is_tried_again_too(server):
    server.plans.append(refuse(UNAVAILABLE, "loading"))
    with Client(server.target) as client:
        assert client.generate("ab" * 500_000, max_tokens=1).text == "c"
    assert len(server.generated) == 2


def test_attempts_are_counted(server):
    server.plans += [refuse(UNAVAILABLE, "loading")] * 10
    with Client(server.target) as client, pytest.raises(errors.Unavailable, match="loading"):
        client.generate("a")
    assert len(server.generated) == 4
    with Client(server.target, ClientOptions(attempts=1)) as client, pytest.raises(errors.Unavailable):
        client.generate("a")
    assert len(server.generated) == 5


def test_a_full_queue_and_a_broken_stream_are_not_tried_again(server):
    def break_off(request, context):
        yield serving_pb2.GenerateEvent(started=started(request), delta=delta(0, 97))
        context.abort(UNAVAILABLE, "a stage died")

    server.plans += [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), break_off]
    with Client(server.target) as client:
        with pytest.raises(errors.ResourceExhausted):
            client.generate("a")
        with pytest.raises(errors.Unavailable, match="a stage died"):
            client.generate("a")
    assert len(server.generated) == 2


def test_a_server_that_keeps_failing_is_not_stormed(server):
    server.plans += [refuse(UNAVAILABLE, "broken", pushback_ms=1)] * 200
    with Client(server.target) as client:
        for _ in range(20):
            with pytest.raises(errors.Unavailable):
                client.generate("a")
    # 20 calls without a throttle are 80 tries; 10 failures use up half of the 20 tokens, and no more retries follow.
    assert len(server.generated) <= 30


def test_the_server_sets_the_pace_of_retries(server):
    server.plans += [refuse(UNAVAILABLE, "loading", pushback_ms=1500)]
    with Client(server.target) as client:
        begun = time.monotonic()
        assert client.generate("a", max_tokens=1).text == "b"
        assert time.monotonic() - begun >= 1.5
        server.plans.append(refuse(UNAVAILABLE, "no more", pushback_ms=-1))
        with pytest.raises(errors.Unavailable, match="no more"):
            client.generate("a")
    assert len(server.generated) == 3


def test_a_client_may_start_before_its_server():
    with FakeServer() as first:
        port = int(first.target.rpartition(":")[2])
    texts: list[str] = []
    with Client(f"127.0.0.1:{port}") as client:
        caller = threading.Thread(target=lambda: texts.append(client.generate("ab", max_tokens=3).text))
        caller.start()
        with pytest.raises(errors.Unavailable):  # what does not generate does not wait
            client.models()
        with pytest.raises(errors.Unavailable), Client(client.target, ClientOptions(wait=False)) as hasty:
            hasty.generate("ab")
        with FakeServer(port=port) as server:
            caller.join(60)
            assert texts == ["cde"]
            assert len(server.generated) == 1


def test_a_client_waits_while_its_server_loads(server):
    server.set_serving(False)
    texts: list[str] = []
    with Client(server.target) as client:
        caller = threading.Thread(target=lambda: texts.append(client.generate("ab", max_tokens=3).text))
        caller.start()
        with pytest.raises(errors.DeadlineExceeded):
            client.generate("ab", timeout_s=0.5)
        assert not server.generated
        server.set_serving(True)
        caller.join(60)
    assert texts == ["cde"]


async def test_the_async_client_waits_while_its_server_loads(server):
    server.set_serving(False)
    async with AsyncClient(server.target, ClientOptions(attempts=1)) as client:
        waiting = asyncio.create_task(client.generate("ab", max_tokens=3))
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("ab", timeout_s=0.5)
        with pytest.raises(errors.Unavailable):
            async with AsyncClient(server.target, ClientOptions(attempts=1, wait=False)) as hasty:
                await hasty.generate("ab")
        assert not waiting.done()
        server.set_serving(True)
        assert (await waiting).text == "cde"


async def test_waiting_ends_at_the_deadline():
    with FakeServer() as gone:
        target = gone.target
    async with AsyncClient(target) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("a", timeout_s=0.3)


def test_message_limits(server):
    with Client(server.target, ClientOptions(max_message_bytes=2048)) as client:
        with pytest.raises(errors.ResourceExhausted):
            client.tokenize("a" * 3000)  # the request
        with pytest.raises(errors.ResourceExhausted):
            client.detokenize([0x800] * 900)  # the response: 3 bytes of text for 2 bytes of id
        assert client.tokenize("é") == (1, 233)
    assert [seen.method for seen in server.seen] == ["Detokenize", "Tokenize"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClientOptions(connections=0), "connections is 0"),
        (lambda: ClientOptions(attempts=6), "attempts is 6"),
        (lambda: ClientOptions(max_message_bytes=1), "max_message_bytes is 1"),
        (lambda: ClientOptions(keepalive_s=float("nan")), "keepalive_s is nan"),
        (lambda: ClientOptions(token="a\nb"), "printable ASCII"),
        (lambda: Tls(cert="x.pem"), "both cert and key"),
        (lambda: Client("x:1", ClientOptions(tls=Tls(ca="/nonexistent/ca.pem"))), "ca: /nonexistent/ca.pem"),
        (lambda: ClientOptions(reach_timeout_s=0), "reach_timeout_s is 0"),
    ],
)
def test_options_are_checked(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_service_config_is_what_grpc_reads():
    config = json.loads(dict(ClientOptions().arguments("x:1", watch_health=True))["grpc.service_config"])
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"] == {"serviceName": "tramontane.v1.Serving"}
    assert "methodConfig" not in ClientOptions(attempts=1).service_config(watch_health=False)
