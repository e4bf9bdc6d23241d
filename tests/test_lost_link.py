"""A gateway, a router and stages in one process: what a link that is lost costs, and when it is of use again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from calls import NOT_SERVING, SERVING, Code, ask, eventually, failure, health_of, stub_of
from fake_pipeline import fake_stats, vocabulary_of
from local_pipeline import LocalPipeline
from models import cached_checkpoint

from tramontane.cluster import async_stream, desk
from tramontane.cluster.address import Address
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.gateway import Gateway
from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.served_model import ServedModel
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.config import ModelConfig

PROMPT = [5, 17, 29, 41]
CONTEXT = 2048


@pytest.fixture(scope="module")
def folder():
    return cached_checkpoint("MixtralForCausalLM", seed=3, num_hidden_layers=4, max_position_embeddings=CONTEXT)


@asynccontextmanager
async def gateway_of(
    whole: LocalPipeline, folder, others: Sequence[tuple[str, Address]] = ()
) -> AsyncIterator[tuple[Gateway, str, list[LinkPipeline]]]:
    """A gateway that is linked with the pipeline's router; where it listens; the links that it has made so far."""
    made: list[LinkPipeline] = []

    async def dial(name: str, address: Address) -> LinkPipeline:
        made.append(await LinkPipeline.dial(name, address, whole.site, gateway="gateway-0"))
        return made[-1]

    config = ModelConfig.load(folder)
    model = ServedModel(
        name="tiny",
        config=config,
        context=CONTEXT,
        dtype="float32",
        stages=2,
        version="v",
        row_invariant=True,
        vocabulary=vocabulary_of(None, config.vocab),
        tokenizer=None,
    )
    gateway = Gateway("gateway-0", model.name, context=CONTEXT, fetch_stats=fake_stats, dial=dial)
    port = await gateway.start(Entrance())
    try:
        gateway.set_model(model)
        await gateway.set_routes(1, [("router-0", whole.router.address), *others])
        yield gateway, f"127.0.0.1:{port}", made
    finally:
        await gateway.close(0.0)


async def drain(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def greedy(tokens: int) -> pb.GenerateRequest:
    stopping = pb.Stopping(max_tokens=tokens, ignore_eos=True)
    return ask(tokens=pb.TokenIds(ids=PROMPT), sampling=pb.Sampling(temperature=0.0), stopping=stopping)


async def test_a_lost_link_ends_its_own_requests_only_and_is_dialled_again(folder):
    async with LocalPipeline(folder, [2, 2]) as whole, gateway_of(whole, folder) as (_, target, made):
        expected = (await whole.generate(PROMPT, max_tokens=200)).tokens
        async with stub_of(target) as stub:
            assert await health_of(target, "") == SERVING
            _, others = whole.submit(PROMPT, max_tokens=200)  # over a link of their own
            call = stub.GenerateStream(greedy(200))
            assert (await call.read()).delta.token_ids[:1] == expected[:1]
            made[0]._link.close("cut")
            assert await health_of(target, "") == NOT_SERVING
            error = await failure(drain(call))
            assert (error.code(), error.details()) == (Code.UNAVAILABLE, "link to router-0: cut")
            await asyncio.wait_for(others.finished, 60)
            assert others.tokens == expected
            await whole.until_idle()
            await eventually(lambda: len(made) == 2)
            assert await health_of(target, "") == SERVING
            assert list((await stub.Generate(greedy(200))).completion.token_ids) == expected


async def test_a_gateway_that_does_not_read_is_cut_off_and_linked_again_when_it_does(folder, monkeypatch):
    """As one is that was stopped under load."""
    monkeypatch.setattr(desk, "OUTBOX_LIMIT", 16)
    monkeypatch.setattr(async_stream, "WRITE_BUFFER_BYTES", 1024)
    async with (
        LocalPipeline(folder, [2, 2]) as whole,
        gateway_of(whole, folder) as (_, target, made),
        stub_of(target) as stub,
    ):
        transport = made[0]._link._stream._connected
        for peer in whole.router._desk._peers:  # else a socket may hold the whole answer
            peer.link._stream.line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        call = stub.GenerateStream(greedy(CONTEXT - len(PROMPT)))
        await eventually(lambda: not whole.idle)
        transport.pause_reading()  # before most of the tokens have come, however slow the call is
        await whole.until_idle()
        assert await health_of(target, "") == SERVING, "it cannot know yet"
        transport.resume_reading()
        error = await failure(drain(call))
        assert error.code() == Code.UNAVAILABLE
        assert error.details().startswith("link to router-0: closed by the other end")
        await eventually(lambda: len(made) == 2)
        assert await health_of(target, "") == SERVING
        assert len((await stub.Generate(greedy(8))).completion.token_ids) == 8


async def test_a_router_that_is_broken_still_listens_and_is_of_no_use(folder):
    async with LocalPipeline(folder, [2, 2]) as whole, gateway_of(whole, folder) as (gateway, target, made):
        whole.workers[1].close()
        await whole.router.broken()
        async with stub_of(target) as stub:
            assert (await failure(stub.Generate(greedy(8)))).code() == Code.UNAVAILABLE
        before = await gateway.link_news(-1)
        await asyncio.sleep(1)  # it is dialled three times meanwhile
        after = await gateway.link_news(-1)
        assert (len(made), after.lost, await health_of(target, "")) == (1, 1, NOT_SERVING)
        assert after.number <= before.number + 1
        assert after.trouble.startswith("router-0: ")


async def test_a_router_that_cannot_be_reached_costs_only_itself(folder):
    nobody = Address("here", "/nowhere", "", 0)
    async with LocalPipeline(folder, [2, 2]) as whole, gateway_of(whole, folder, [("router-9", nobody)]) as made:
        gateway, target, _ = made
        assert await health_of(target, "") == SERVING
        assert (await gateway.link_news(-1)).trouble.startswith("router-9: no handshake with ")
