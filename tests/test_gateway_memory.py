"""What a gateway keeps of prompts: nothing of those that it refused, no text of those that are generating."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil
import pytest
from calls import Code, ask, eventually, failure, stub_of
from fake_pipeline import FakePipeline, dial_fake, fake_stats, routes_to, serving, tiny_model, tiny_tokenizer

from tramontane.cluster import servicer as servicers
from tramontane.cluster.errors import CallError
from tramontane.cluster.offer import Offer
from tramontane.cluster.servicer import Servicer
from tramontane.cluster.users import Users
from tramontane.cluster.validation import InvalidField, validate_in_steps
from tramontane.protos import serving_pb2 as pb

MiB = 1 << 20
LARGE = "a summer " * 600
"""Tokenized on a thread."""


async def test_refused_texts_do_not_stay_in_memory():
    """They are tokenized up to the context, since so few bytes might fit."""
    model = tiny_model(context=100_000, tokenizer=tiny_tokenizer())
    text = "thou art more lovely and more temperate, qxzj " * 15_000
    async with serving(model=model) as (_, target), stub_of(target) as stub:
        assert (await failure(stub.Generate(ask(text)))).code() == Code.INVALID_ARGUMENT
        before = psutil.Process().memory_info().rss
        for call in (stub.Generate(ask(text)), stub.Tokenize(pb.TokenizeRequest(text=text))) * 15:
            error = await failure(call)
            assert error.code() == Code.INVALID_ARGUMENT
            assert "tokens" in error.details()
        assert psutil.Process().memory_info().rss - before < 60 * MiB


class Held:
    """Something that a call works on; counts those that live."""

    alive = 0

    def __init__(self) -> None:
        Held.alive += 1

    def __del__(self) -> None:
        Held.alive -= 1


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever lives in a circle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


REFUSALS = {
    "a bad field": lambda: InvalidField("text", "is not right"),
    "too much": lambda: CallError(Code.INVALID_ARGUMENT, "no"),
}


def refuse_on(step: int, refusal: str):
    """A validation that holds something when it refuses, and whose cause does."""

    def refuse(message, model, request_id):
        held = Held()
        for _ in range(step):
            yield
        try:
            raise ValueError(f"the cause, with {held}")
        except ValueError as error:
            raise REFUSALS[refusal]() from error

    return refuse


@pytest.mark.parametrize("refusal", list(REFUSALS))
@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_refused_call_s_frames_are_gone_with_it(monkeypatch, no_collector, step, method, refusal):
    monkeypatch.setattr(servicers, "validate_in_steps", refuse_on(step, refusal))
    async with serving() as (_, target), stub_of(target) as stub:
        call = getattr(stub, method)(ask(LARGE))
        error = await failure(call if method == "Generate" else call.read())
        assert error.code() == Code.INVALID_ARGUMENT
        del error
        await eventually(lambda: Held.alive == 0)


@pytest.mark.parametrize("step", [0, 1, 3])
async def test_a_refused_call_s_message_is_gone_with_it(monkeypatch, no_collector, step):
    monkeypatch.setattr(servicers, "validate_in_steps", refuse_on(step, "a bad field"))
    async with servicer_over(FakePipeline(), running=True) as servicer:
        with pytest.raises(CallError) as refused:
            await servicer.Generate(Stand(ask(LARGE)), Context())
        assert refused.value.code == Code.INVALID_ARGUMENT
        del refused
        await eventually(lambda: Held.alive == 0)


@pytest.mark.parametrize("way", ["while it is tokenized", "while it generates"])
async def test_a_late_call_s_frames_are_gone_with_it(monkeypatch, no_collector, way):
    """Where the gateway keeps the deadline itself; over a channel gRPC ends most late calls."""

    def hold(message, model, request_id):
        held = Held()
        yield
        for _ in range(1 << 30 if way == "while it is tokenized" else 1):
            yield
        assert held
        return (yield from validate_in_steps(message, model, request_id))

    monkeypatch.setattr(servicers, "validate_in_steps", hold)
    async with servicer_over(FakePipeline(), running=False) as servicer:
        with pytest.raises(CallError) as late:
            await servicer.Generate(ask(LARGE), Context(remaining_s=0.1))
        assert late.value.code == Code.DEADLINE_EXCEEDED
        del late
        await eventually(lambda: Held.alive == 0)


class Stand(Held):
    """A request's message, of which a test can tell whether it lives."""

    def __init__(self, message: pb.GenerateRequest) -> None:
        super().__init__()
        self._message = message

    def __getattr__(self, name: str) -> object:
        return getattr(self._message, name)


@dataclass
class Context:
    """A call's, for servicers without a server."""

    remaining_s: float | None = None

    def time_remaining(self) -> float | None:
        return self.remaining_s

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    async def write(self, event: pb.GenerateEvent) -> None:
        pass


@asynccontextmanager
async def servicer_over(pipeline: FakePipeline, *, running: bool) -> AsyncIterator[Servicer]:
    if not running:
        pipeline.running.clear()
    offer = Offer("tiny", dial_fake, lambda: None)
    offer.set_model(tiny_model(tokenizer=tiny_tokenizer()))
    await offer.routes.set(1, routes_to(pipeline))
    servicer = Servicer(offer, Users(), fake_stats)
    yield servicer
    servicer.close()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_request_s_text_is_not_kept_while_it_generates(no_collector, method):
    pipeline = FakePipeline()
    async with servicer_over(pipeline, running=False) as servicer:
        call = asyncio.create_task(getattr(servicer, method)(Stand(ask(LARGE)), Context()))
        await eventually(lambda: pipeline.open)
        assert Held.alive == 0
        pipeline.running.set()
        await call
