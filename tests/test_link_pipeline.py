"""A gateway's end of the link to a router, with a router that is written out in the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from wires import site_at

from tramontane.cluster import link_pipeline
from tramontane.cluster.async_link import AsyncLink, AsyncListener
from tramontane.cluster.frames import Message
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.messages import (
    Cancel,
    EndReason,
    Finished,
    Hello,
    Load,
    Role,
    Sampling,
    Stopping,
    Submit,
    Tokens,
)


class ScriptedRouter:
    """Keeps what it receives, sends what it is told."""

    def __init__(self, *first: Message) -> None:
        self.first = first or (Load(outstanding_tokens=0),)
        self.link: AsyncLink | None = None
        self.hello: Hello | None = None
        self.received: list[Submit | Cancel] = []
        self.left = asyncio.Event()

    async def on_link(self, link: AsyncLink, hello: Hello) -> None:
        self.link, self.hello = link, hello
        for message in self.first:
            await link.send(message)
        async for message in link.messages():
            self.received.append(message)
        self.left.set()


class Kept:
    """A receiver that keeps what it hears."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.offsets: list[int] = []
        self.log_probabilities: list[float] = []
        self.finished: Finished | None = None

    def put(self, offset: int, token: int, log_probability: float) -> None:
        assert offset == len(self.tokens), f"token at offset {offset}, expected {len(self.tokens)}"
        self.tokens.append(token)
        self.offsets.append(offset)
        self.log_probabilities.append(log_probability)

    def end(self, finished: Finished) -> None:
        self.finished = finished


def send(pipeline: LinkPipeline, submit: Submit) -> Kept:
    kept = Kept()
    pipeline.submit(submit, kept)
    return kept


@asynccontextmanager
async def linked(tmp_path: Path) -> AsyncIterator[tuple[ScriptedRouter, LinkPipeline]]:
    router = ScriptedRouter()
    site = site_at(tmp_path, host=None)
    listener = AsyncListener("router-0", site, router.on_link)
    await listener.start()
    pipeline = await LinkPipeline.dial("router-0", listener.address, site, gateway="gateway-0")
    try:
        await eventually(lambda: router.link is not None)
        yield router, pipeline
    finally:
        await pipeline.close()
        await listener.close()


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def submit_of(request: int, prompt: int = 3, max_tokens: int = 4) -> Submit:
    return Submit(
        request=request,
        request_id=f"r{request}",
        tokens=np.arange(prompt, dtype=np.int32),
        sampling=Sampling(temperature=0.5, seed=2**64 - 1),
        stopping=Stopping(max_tokens=max_tokens, token_ids=(2,)),
        remaining_ms=None,
    )


def tokens_of(*rows: tuple[int, int, int]) -> Tokens:
    """Rows of request, offset, token."""
    requests, offsets, tokens = zip(*rows, strict=True)
    return Tokens(
        request=np.array(requests, np.int64),
        offset=np.array(offsets, np.int32),
        token=np.array(tokens, np.int32),
        log_probability=np.full(len(rows), -0.5, np.float32),
    )


def finished_of(request: int) -> Finished:
    return Finished(request=request, reason=EndReason.LENGTH, detail="", queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)


async def test_a_request_goes_down_and_its_tokens_come_up(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        assert (router.hello.role, router.hello.name, router.hello.epoch) == (Role.GATEWAY, "gateway-0", 0)
        first, second = send(pipeline, submit_of(1)), send(pipeline, submit_of(2))
        await eventually(lambda: len(router.received) == 2)
        assert [message.request_id for message in router.received] == ["r1", "r2"]
        assert router.received[0].sampling.seed == 2**64 - 1
        await router.link.send(tokens_of((1, 0, 11), (2, 0, 21)))
        await router.link.send(tokens_of((1, 1, 12)))
        await router.link.send(finished_of(2))
        await eventually(lambda: second.finished is not None)
        assert (first.tokens, first.offsets, first.log_probabilities) == ([11, 12], [0, 1], [-0.5, -0.5])
        assert (second.tokens, second.finished.reason) == ([21], EndReason.LENGTH)
        assert first.finished is None


async def test_cancel_goes_down_once_and_what_is_still_on_its_way_is_dropped(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        first = send(pipeline, submit_of(1))
        other = send(pipeline, submit_of(2))
        pipeline.cancel(1)
        pipeline.cancel(1)
        pipeline.cancel(7)
        await eventually(lambda: len(router.received) == 3)
        assert [(type(message), message.request) for message in router.received] == [
            (Submit, 1),
            (Submit, 2),
            (Cancel, 1),
        ]
        await router.link.send(tokens_of((1, 0, 11), (2, 0, 21)))
        await router.link.send(finished_of(1))
        await eventually(lambda: other.tokens == [21])
        assert (first.tokens, first.finished) == ([], None)
        assert not pipeline.broken.done()


async def test_a_finished_request_is_not_cancelled(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        kept = send(pipeline, submit_of(1))
        await eventually(lambda: router.received)
        await router.link.send(finished_of(1))
        await eventually(lambda: kept.finished is not None)
        pipeline.cancel(1)
        send(pipeline, submit_of(2))
        await eventually(lambda: len(router.received) == 2)
        assert [type(message) for message in router.received] == [Submit, Submit]


async def test_outstanding_tokens_are_the_router_s_and_what_it_does_not_know_yet(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        assert pipeline.outstanding_tokens == 0
        send(pipeline, submit_of(1, prompt=3, max_tokens=4))
        assert pipeline.outstanding_tokens == 7
        await router.link.send(Load(outstanding_tokens=100))
        await eventually(lambda: pipeline.outstanding_tokens == 100)
        send(pipeline, submit_of(2, prompt=3, max_tokens=4))
        assert pipeline.outstanding_tokens == 107


async def test_a_link_that_closes_ends_every_request(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        open_ones = [send(pipeline, submit_of(number)) for number in range(3)]
        await eventually(lambda: len(router.received) == 3)
        await router.link.send(tokens_of((0, 0, 11)))
        await eventually(lambda: open_ones[0].tokens == [11])
        router.link.close()
        for kept in open_ones:
            await eventually(lambda kept=kept: kept.finished is not None)
            assert kept.finished.reason is EndReason.BROKEN
            assert "router-0" in kept.finished.detail
        assert "router-0" in await asyncio.wait_for(pipeline.broken, 30)
        assert send(pipeline, submit_of(9)).finished.reason is EndReason.BROKEN
        pipeline.cancel(9)


@pytest.mark.parametrize("rows", [((1, 1, 11),), ((1, 0, 11), (1, 0, 11))])
async def test_a_gap_or_a_repeat_breaks_the_pipeline_rather_than_the_stream(tmp_path, rows):
    async with linked(tmp_path) as (router, pipeline):
        kept = send(pipeline, submit_of(1))
        await eventually(lambda: router.received)
        await router.link.send(tokens_of(*rows))
        assert "offset" in await asyncio.wait_for(asyncio.shield(pipeline.broken), 30)
        assert kept.finished.reason is EndReason.BROKEN


async def test_a_router_that_speaks_out_of_turn_is_cut_off(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        await router.link.send(Cancel(request=1))
        assert "Cancel" in await asyncio.wait_for(asyncio.shield(pipeline.broken), 30)
        await asyncio.wait_for(router.left.wait(), 30)


async def test_a_retired_pipeline_closes_when_its_last_request_has_ended(tmp_path):
    async with linked(tmp_path) as (router, pipeline):
        kept = send(pipeline, submit_of(1))
        await eventually(lambda: router.received)
        pipeline.retire()
        assert not pipeline.broken.done()
        await router.link.send(finished_of(1))
        await asyncio.wait_for(router.left.wait(), 30)
        assert kept.finished.reason is EndReason.LENGTH
        assert pipeline.broken.done()


@pytest.mark.parametrize(
    ("on_link", "complaint"),
    [
        (lambda link, hello: link.send(Cancel(request=1)), "router-0 sent Cancel"),
        (lambda link, hello: asyncio.sleep(0), "closed by the other end"),  # as a broken one does
        (lambda link, hello: asyncio.Event().wait(), "router-0 says nothing"),
    ],
    ids=["other", "broken", "silent"],
)
async def test_a_router_that_does_not_tell_its_load_serves_nobody(tmp_path, monkeypatch, on_link, complaint):
    monkeypatch.setattr(link_pipeline, "DIAL_TIMEOUT_S", 0.5)
    site = site_at(tmp_path, host=None)
    listener = AsyncListener("router-0", site, on_link)
    await listener.start()
    with pytest.raises(LinkClosed, match=complaint):
        await LinkPipeline.dial("router-0", listener.address, site, gateway="gateway-0")
    await listener.close()


async def test_dialling_a_router_that_is_gone_says_so(tmp_path):
    site = site_at(tmp_path, host=None)
    listener = AsyncListener("router-0", site, ScriptedRouter().on_link)
    await listener.start()
    gone = listener.address
    await listener.close()
    with pytest.raises(LinkClosed):
        await LinkPipeline.dial("router-0", gone, site, gateway="gateway-0")
