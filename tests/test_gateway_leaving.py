"""Clients of a gateway that leave early, or read late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from calls import (
    Code,
    ask,
    events_of,
    eventually,
    failure,
    generate,
    stub_of,
)
from fake_pipeline import (
    FakePipeline,
    dial_fake,
    fake_stats,
    routes_to,
    serving,
    tiny_model,
    tiny_tokenizer,
)

from tramontane.cluster.errors import CallError
from tramontane.cluster.messages import Submit
from tramontane.cluster.offer import Offer
from tramontane.cluster.servicer import Servicer
from tramontane.cluster.steps import Steps
from tramontane.cluster.users import Users
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.microbatch import Int32Array


@pytest.mark.parametrize("after", ["no token", "some tokens"])
@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
async def test_a_client_that_leaves_frees_its_request(way, after):
    pipeline = FakePipeline(pause_s=0.001)
    if after == "no token":
        pipeline.running.clear()
    async with serving(pipeline) as (gateway, target):
        async with stub_of(target) as stub:
            timeout = 0.5 if way == "deadline" else None
            call = stub.GenerateStream(ask(stopping=pb.Stopping(max_tokens=4000)), timeout=timeout)
            if after == "some tokens":
                await call.read()
            await eventually(lambda: len(pipeline.open) == 1)
            if way == "cancel":
                call.cancel()
            elif way == "deadline":
                error = await failure(events_of(call) if after == "no token" else drain(call))
                assert error.code() == Code.DEADLINE_EXCEEDED
        await eventually(lambda: not pipeline.open)
        assert pipeline.cancelled == [0]
        await asyncio.wait_for(gateway._servicer.wait_idle(), 30)
        pipeline.running.set()
        async with stub_of(target) as stub:
            assert (await stub.Generate(ask())).finished.usage.completion_tokens == 8


async def drain(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_the_gateway_keeps_the_deadline_itself():
    """Over a channel grpc ends the call at the same moment; here it does not."""

    class Context:
        def time_remaining(self) -> float:
            return 0.1

        def peer(self) -> str:
            return "ipv4:127.0.0.1:5000"

    pipeline = FakePipeline()
    pipeline.running.clear()
    offer = Offer("tiny", dial_fake, lambda: None)
    offer.set_model(tiny_model(tokenizer=tiny_tokenizer()))
    await offer.routes.set(1, routes_to(pipeline))
    servicer = Servicer(offer, Users(), fake_stats)
    with pytest.raises(CallError) as late:
        await asyncio.wait_for(servicer.Generate(ask(), Context()), 30)
    assert late.value.code == Code.DEADLINE_EXCEEDED
    assert pipeline.cancelled == [0]
    servicer.close()


SMALL_WINDOW = {"http2.bdp_probe": 0, "http2.lookahead_bytes": 1024}
"""A client that lets the server send 64 KiB ahead of its reading, and no more."""


async def test_a_slow_reader_makes_no_queue_of_messages():
    pipeline = FakePipeline()
    model = tiny_model(context=50_000)
    async with serving(pipeline, model=model) as (_, target), stub_of(target, **SMALL_WINDOW) as stub:
        call = stub.GenerateStream(ask(tokens=pb.TokenIds(ids=[299]), stopping=pb.Stopping(max_tokens=20_000)))
        events = [await call.read()]
        await eventually(lambda: pipeline.produced == 20_000)
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        ids = [token for event in events for token in event.delta.token_ids]
        assert ids == [300 + index % 80 for index in range(20_000)]
        assert len(events) < 2000, "messages queued up for a reader that had stopped"
        assert events[-1].finished.reason == pb.LENGTH


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_a_reader_that_stopped_still_frees_its_request(way):
    """The gateway is blocked in a write then, not in waiting for tokens."""
    pipeline = FakePipeline(reply=lambda submit: iter(lambda: 300, None), pause_s=0.0)
    model = tiny_model(context=2_000_000)
    async with serving(pipeline, model=model) as (gateway, target), stub_of(target, **SMALL_WINDOW) as stub:
        call = stub.GenerateStream(
            ask(tokens=pb.TokenIds(ids=[299]), stopping=pb.Stopping(max_tokens=1_900_000)),
            timeout=1.5 if way == "deadline" else None,
        )
        await call.read()
        await eventually(lambda: pipeline.produced > 10_000)
        if way == "cancel":
            call.cancel()
        await eventually(lambda: pipeline.cancelled == [0])
        await asyncio.wait_for(gateway._servicer.wait_idle(), 30)


async def test_a_stop_string_frees_the_pipeline_before_a_slow_reader_has_read():
    ids = tiny_tokenizer().encode("many words go on ", add_bos=False)
    end = tiny_tokenizer().encode("END", add_bos=False)

    def reply(submit: Submit) -> Iterator[int]:
        yield from ids * 1500
        yield from end
        pipeline.running.clear()
        yield from ids

    pipeline = FakePipeline(reply=reply)
    model = tiny_model(context=100_000, tokenizer=tiny_tokenizer())
    async with serving(pipeline, model=model) as (_, target), stub_of(target, **SMALL_WINDOW) as stub:
        call = stub.GenerateStream(ask(stopping=pb.Stopping(max_tokens=90_000, strings=["END"])))
        events = [await call.read()]
        await eventually(lambda: pipeline.cancelled == [0])
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        assert events[-1].finished.reason == pb.STOP_STRING
        assert "".join(event.delta.text for event in events).count("many words go on ") == 1500


async def test_a_large_text_is_tokenized_beside_the_event_loop():
    model = tiny_model(tokenizer=tiny_tokenizer())
    go_on = threading.Event()

    class Slow:
        """Encodes when told to."""

        eos_id = 2

        def encode_in_steps(self, text: str, *, add_bos: bool, most: int) -> Steps[Int32Array]:
            yield
            assert len(text) < 5000 or go_on.wait(30)
            return np.array([5], np.int32)

        def __getattr__(self, name: str) -> object:
            return getattr(model.tokenizer, name)

    async with serving(model=tiny_model(tokenizer=Slow())) as (_, target), stub_of(target) as stub:
        large = asyncio.ensure_future(generate(stub, "x" * 5000))
        small = await asyncio.wait_for(stub.Generate(ask("small")), 20)
        assert small.finished.usage.completion_tokens == 8
        assert not large.done()
        go_on.set()
        assert (await large).finished.usage.completion_tokens == 8
