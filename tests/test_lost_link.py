"""A gateway, a router and stages in one process: what a link that is lost costs, and when it is of use again."""

from __future__ import annotations

import asyncio

import pytest
from calls import NOT_SERVING, SERVING, Code, ask, eventually, failure, health_of, stub_of
from fake_pipeline import fake_stats
from local_pipeline import LocalPipeline
from models import cached_checkpoint

from tramontane.cluster.doors import Address
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.gateway import Gateway
from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.served_model import ServedModel
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.config import ModelConfig

PROMPT = [5, 17, 29, 41]


@pytest.fixture(scope="module")
def folder():
    return cached_checkpoint("MixtralForCausalLM", seed=3, num_hidden_layers=4, max_position_embeddings=256)


async def test_a_lost_link_ends_its_own_requests_only_and_is_dialled_again(folder):
    async with LocalPipeline(folder, [2, 2]) as whole:
        made: list[LinkPipeline] = []

        async def dial(name: str, address: Address) -> LinkPipeline:
            made.append(await LinkPipeline.dial(name, address, whole.site, gateway="gateway-0"))
            return made[-1]

        expected = (await whole.generate(PROMPT, max_tokens=200)).tokens
        gateway = Gateway("gateway-0", "tiny", context=256, fetch_stats=fake_stats, dial=dial)
        target = f"127.0.0.1:{await gateway.start(Entrance())}"
        gateway.set_model(model_of(folder))
        await gateway.set_routes(1, [("router-0", whole.router.address)])
        request = ask(tokens=pb.TokenIds(ids=PROMPT), sampling=greedy(), stopping=stopping(200))
        async with stub_of(target) as stub:
            assert await health_of(target, "") == SERVING
            _, others = whole.submit(PROMPT, max_tokens=200)  # over a link of their own
            call = stub.GenerateStream(request)
            assert (await call.read()).delta.token_ids[:1] == expected[:1]
            made[0]._link.close("cut")
            assert await health_of(target, "") == NOT_SERVING
            assert await call.code() == Code.UNAVAILABLE
            assert await call.details() == "link to router-0: cut"
            await asyncio.wait_for(others.finished, 60)
            assert others.tokens == expected
            await whole.until_idle()

            await eventually(lambda: len(made) == 2)
            assert await health_of(target, "") == SERVING
            assert list((await stub.Generate(request)).completion.token_ids) == expected

            # A router that is broken still listens, and is of no use.
            whole.workers[1].close()
            await whole.router.broken()
            assert (await failure(stub.Generate(request))).code() == Code.UNAVAILABLE
            seen = (await gateway.link_news(-1)).number
            await asyncio.sleep(1)  # it is dialled three times meanwhile
            news = await gateway.link_news(-1)
            assert (len(made), news.lost, await health_of(target, "")) == (2, 2, NOT_SERVING)
            assert news.number <= seen + 1
            assert news.trouble.startswith("router-0: ")
        await gateway.close(0.0)


async def test_a_router_that_cannot_be_reached_costs_only_itself(folder):
    async with LocalPipeline(folder, [2, 2]) as whole:

        async def dial(name: str, address: Address) -> LinkPipeline:
            return await LinkPipeline.dial(name, address, whole.site, gateway="gateway-0")

        gateway = Gateway("gateway-0", "tiny", context=256, fetch_stats=fake_stats, dial=dial)
        target = f"127.0.0.1:{await gateway.start(Entrance())}"
        gateway.set_model(model_of(folder))
        await gateway.set_routes(1, [("router-0", whole.router.address), ("router-9", Address("here", "/no", "", 0))])
        assert await health_of(target, "") == SERVING
        assert (await gateway.link_news(-1)).trouble.startswith("router-9: no handshake with ")
        await gateway.close(0.0)


def model_of(folder) -> ServedModel:
    return ServedModel(
        name="tiny",
        config=ModelConfig.load(folder),
        context=256,
        dtype="float32",
        stages=2,
        version="v",
        row_invariant=True,
        tokenizer=None,
    )


def greedy() -> pb.Sampling:
    return pb.Sampling(temperature=0.0)


def stopping(tokens: int) -> pb.Stopping:
    return pb.Stopping(max_tokens=tokens, ignore_eos=True)
