"""What clients and streams say of themselves, and what becomes of them: closed, in another event loop, in an error."""

from __future__ import annotations

import asyncio
import gc

import pytest
from fake_server import hold

from tramontane.client import AsyncClient, Client, ClientOptions, Tls, errors


async def test_a_closed_client_says_so(server):
    client = Client(server.target)
    client.models()
    client.close()
    for call in (client.models, client.health, lambda: client.generate("a"), lambda: client.stream("a")):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    other = AsyncClient(server.target)
    await other.models()
    await other.close()
    for call in (other.models, other.health, lambda: other.generate("a")):
        with pytest.raises(RuntimeError, match="the client is closed"):
            await call()
    with pytest.raises(RuntimeError, match="the client is closed"):
        other.stream("a")
    await other.close()


async def test_closing_a_client_ends_its_streams(server):
    server.plans += [hold(1)] * 2
    client, other = Client(server.target), AsyncClient(server.target)
    stream, async_stream = client.stream("a"), other.stream("a")
    assert (next(stream).text, (await anext(async_stream)).text) == ("a", "a")
    client.close()
    await other.close()
    with pytest.raises(errors.Cancelled, match="closed"):
        next(stream)
    with pytest.raises(errors.Cancelled, match="closed"):
        await anext(async_stream)


@pytest.mark.filterwarnings("error")
def test_an_async_client_belongs_to_one_loop(server):
    client = AsyncClient(server.target)

    async def models():
        return await client.models()

    async def stream():
        return client.stream("a")

    async def close():
        await client.close()

    async def twice():
        await models()
        loop = asyncio.new_event_loop()
        for call in (models, stream, close):
            with pytest.raises(RuntimeError, match="belongs to another event loop, that of its first call; make one"):
                await asyncio.to_thread(loop.run_until_complete, call())
        loop.close()
        assert await models()

    async def later():
        for call in (models, stream):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await call()
        await close()

    asyncio.run(twice())
    asyncio.run(later())
    gc.collect()  # a coroutine that was never awaited says so now


async def test_what_clients_and_streams_are_is_readable(server):
    options = ClientOptions(token="sesame", tls=Tls())
    assert repr(Client("a.example:1", options)) == "<Client a.example:1, TLS>"
    assert repr(AsyncClient("a.example:1", options)) == "<AsyncClient a.example:1, TLS>"
    with Client(server.target) as client:
        assert repr(client) == f"<Client {server.target}>"
        stream = client.stream("a", max_tokens=2, request_id="r-1")
        assert repr(stream) == "<Stream of request r-1: nothing yet>"
        next(stream)
        assert repr(stream) == "<Stream of request r-1: 1 tokens so far>"
        list(stream)
        assert repr(stream) == "<Stream of request r-1: 2 tokens, ended by length>"
    assert repr(client) == f"<Client {server.target}, closed>"
    async with AsyncClient(server.target) as client, client.stream("a", request_id="r-2") as stream:
        assert repr(stream) == "<AsyncStream of request r-2: nothing yet>"
    assert repr(client) == f"<AsyncClient {server.target}, closed>"


async def test_every_call_has_a_name_that_its_error_carries(server):
    with Client(server.target) as client:
        with pytest.raises(errors.NotFound) as blocking:
            client.health("no.such.Service")
        client.models()
    async with AsyncClient(server.target) as client:
        with pytest.raises(errors.NotFound) as awaited:
            await client.health("no.such.Service")
    assert "" not in (blocking.value.request_id, awaited.value.request_id)
    assert server.seen[0].metadata["x-request-id"] not in ("", blocking.value.request_id)
