"""A gateway over a real gRPC channel, in front of pipelines whose tokens can be computed by hand."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from fake_pipeline import (
    LOG_PROBABILITY,
    FakePipeline,
    fake_stats,
    serving,
    tiny_model,
    tiny_tokenizer,
)
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tramontane.cluster.errors import CallError
from tramontane.cluster.gateway import Gateway
from tramontane.cluster.messages import EndReason
from tramontane.cluster.offer import Offer
from tramontane.cluster.servicer import Servicer
from tramontane.protos import serving_pb2 as pb
from tramontane.protos import serving_pb2_grpc as pb_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "tramontane.v1.Serving", "tramontane.v1.Serving/tiny")
Code = grpc.StatusCode


def ask(text: str = "a summer", **fields) -> pb.GenerateRequest:
    if "tokens" not in fields:
        fields["text"] = text
    return pb.GenerateRequest(**{"stopping": pb.Stopping(max_tokens=8), **fields})


def says(text: str) -> Callable[[object], list[int]]:
    """A pipeline's reply that prints this text, then EOS."""
    return lambda submit: [*tiny_tokenizer().encode(text, add_bos=False), 2]


@asynccontextmanager
async def stub_of(target: str, **options: int) -> AsyncIterator[pb_grpc.ServingStub]:
    named = [(f"grpc.{name}", value) for name, value in options.items()]
    async with grpc.aio.insecure_channel(target, options=named) as channel:
        yield pb_grpc.ServingStub(channel)


async def events_of(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateEvent]:
    return [event async for event in call]


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (conditions are about other objects)
            await asyncio.sleep(0.01)


async def failure(call: object) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def details_of(error: grpc.aio.AioRpcError) -> dict[type[Message], Message]:
    """The status's details by their type."""
    found = {}
    for packed in rpc_status.from_call(error).details:
        for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.RequestInfo):
            if packed.Is(kind.DESCRIPTOR):
                found[kind] = kind()
                packed.Unpack(found[kind])
    return found


async def health_of(target: str, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


# What a request gets


async def test_a_stream_collected_is_what_unary_answers():
    pipeline = FakePipeline(reply=says("more lovely \N{GRINNING FACE} and  more"), pause_s=0.001)
    request = ask(request_id="mine", sampling=pb.Sampling(seed=7), stopping=pb.Stopping(max_tokens=100))
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        events = await events_of(stub.GenerateStream(request))
        whole = await stub.Generate(request)

        ids = [token for event in events for token in event.delta.token_ids]
        assert len(events) > 3
        assert ids == [*tiny_tokenizer().encode("more lovely \N{GRINNING FACE} and  more", add_bos=False), 2]
        assert list(whole.completion.token_ids) == ids
        assert list(whole.completion.log_probabilities) == [LOG_PROBABILITY] * len(ids)
        assert "".join(event.delta.text for event in events) == whole.completion.text
        assert whole.completion.text == " more lovely \N{GRINNING FACE} and  more"
        answer = await stub.Detokenize(pb.DetokenizeRequest(ids=ids, continuation=True))
        assert answer.text == whole.completion.text

        assert [event.HasField("started") for event in events] == [True] + [False] * (len(events) - 1)
        assert [event.HasField("finished") for event in events] == [False] * (len(events) - 1) + [True]
        assert events[0].started == whole.started
        assert whole.started == pb.Started(request_id="mine", seed=7, version="v-tiny", prompt_tokens=3)
        assert events[-1].finished.usage == whole.finished.usage
        assert whole.finished.usage == pb.Usage(prompt_tokens=3, completion_tokens=len(ids))
        assert events[-1].finished.reason == whole.finished.reason == pb.STOP_TOKEN
        place = 0
        for event in events:
            if event.delta.token_ids:
                assert event.delta.offset == place
                place += len(event.delta.token_ids)


async def test_nothing_leaves_before_the_first_token():
    pipeline = FakePipeline()
    pipeline.running.clear()
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        call = stub.GenerateStream(ask())
        first = asyncio.ensure_future(call.read())
        metadata = asyncio.ensure_future(call.initial_metadata())
        await eventually(lambda: pipeline.submitted)
        await asyncio.sleep(0.1)
        assert not first.done()
        assert not metadata.done(), "initial metadata before the first token ends grpc's own retry"
        pipeline.running.set()
        event = await first
        assert event.HasField("started")
        assert event.delta.token_ids


async def test_timings_are_the_router_s_plus_the_gateway_s_share():
    async with serving() as (_, target), stub_of(target) as stub:
        timings = (await stub.Generate(ask())).finished.timings
        assert timings.queue_ms > 1.0
        assert (timings.prefill_ms, timings.decode_ms) == (2.0, 3.0)


async def test_what_is_unset_is_chosen_and_told():
    pipeline = FakePipeline()
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        first, second = await stub.Generate(ask()), await stub.Generate(ask())
        assert first.started.request_id != second.started.request_id
        assert [first.started.seed, second.started.seed] == [submit.seed for submit in pipeline.submitted]
        assert first.started.seed != second.started.seed
        assert pipeline.submitted[0].remaining_ms is None
        await stub.Generate(ask(), timeout=60)
        assert 0 < pipeline.submitted[-1].remaining_ms < 61_000, "grpc rounds a timeout up"


@pytest.mark.parametrize("min_tokens", [0, 4])
async def test_a_stop_string_ends_the_completion_and_frees_the_pipeline(min_tokens):
    ids = tiny_tokenizer().encode("one two, one two, one two", add_bos=False)
    pipeline = FakePipeline(reply=lambda submit: ids * 100, pause_s=0.001)
    stopping = pb.Stopping(max_tokens=1000, min_tokens=min_tokens, strings=["two,", "never"])
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        whole = await stub.Generate(ask(stopping=stopping))
        assert whole.finished.reason == pb.STOP_STRING
        count = whole.finished.usage.completion_tokens
        assert list(whole.completion.token_ids) == (ids * 100)[:count]
        everything = (await stub.Detokenize(pb.DetokenizeRequest(ids=(ids * 100)[:count], continuation=True))).text
        before = (await stub.Detokenize(pb.DetokenizeRequest(ids=(ids * 100)[: count - 1], continuation=True))).text
        assert whole.completion.text + "two," == everything[: len(whole.completion.text) + 4]
        assert len(before) < len(whole.completion.text) + 4 <= len(everything), "another token completed it"
        assert count > min_tokens
        assert pipeline.cancelled == [0]
        assert pipeline.produced < 1000
        timings = whole.finished.timings
        assert min(timings.queue_ms, timings.prefill_ms, timings.decode_ms) > 0


async def test_text_that_may_begin_a_stop_string_lags_and_its_ids_do_not():
    pipeline = FakePipeline(reply=says("abc"))
    ids = tiny_tokenizer().encode("abc", add_bos=False)
    stopping = pb.Stopping(max_tokens=len(ids), strings=["abcd"])
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        events = await events_of(stub.GenerateStream(ask(stopping=stopping)))
        assert [token for event in events for token in event.delta.token_ids] == ids
        assert [event.delta.text.strip() for event in events][:-1] == [""] * (len(events) - 1)
        assert "".join(event.delta.text for event in events) == " abc"
        assert events[-1].finished.reason == pb.LENGTH


async def test_a_model_without_tokenizer_takes_and_gives_ids():
    async with serving(model=tiny_model()) as (_, target), stub_of(target) as stub:
        whole = await stub.Generate(ask(tokens=pb.TokenIds(ids=[299])))
        assert list(whole.completion.token_ids) == [300, 301, 302, 303, 304, 305, 306, 307]
        assert whole.completion.text == ""
        for call in (stub.Generate(ask("text")), stub.Tokenize(pb.TokenizeRequest(text="a"))):
            error = await failure(call)
            assert (error.code(), "needs a tokenizer" in error.details()) == (Code.INVALID_ARGUMENT, True)
        assert not (await stub.ListModels(pb.ListModelsRequest())).models[0].has_tokenizer


async def test_tokenize_is_what_a_prompt_goes_through():
    pipeline = FakePipeline()
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        await stub.Generate(ask("summer </s>"))
        ids = list((await stub.Tokenize(pb.TokenizeRequest(text="summer </s>"))).ids)
        assert ids == pipeline.submitted[0].tokens.tolist()
        bare = list((await stub.Tokenize(pb.TokenizeRequest(text="summer </s>", add_bos=False))).ids)
        assert ids == [1, *bare]
        assert (await stub.Detokenize(pb.DetokenizeRequest(ids=ids))).text == "summer </s>"
        assert (await stub.Detokenize(pb.DetokenizeRequest(ids=ids, continuation=True))).text == " summer </s>"


async def test_models_and_stats():
    async with serving() as (_, target), stub_of(target) as stub:
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.context_tokens, model.window_tokens, model.serving) == ("tiny", 4096, 8, True)
        stats = await stub.GetStats(pb.GetStatsRequest())
        assert (stats.processes[0].role, stats.processes[0].pid, stats.stages[0].busy_ns) == ("gateway", 7, 5)
        assert list(stats.routers[0].kv_blocks_total) == [10, 20]


async def test_reflection_lists_the_services():
    async with serving() as (_, target), grpc.aio.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        (answer,) = [answer async for answer in call]
        names = {service.name for service in answer.list_services_response.service}
        assert {"tramontane.v1.Serving", "grpc.health.v1.Health"} <= names


# What is refused, and how


async def send_raw(stub: pb_grpc.ServingStub, target: str, method: str, body: bytes) -> object:
    async with grpc.aio.insecure_channel(target) as channel:
        return await channel.unary_unary(f"/tramontane.v1.Serving/{method}")(body)


async def send_raw_stream(stub: pb_grpc.ServingStub, target: str, body: bytes) -> object:
    async with grpc.aio.insecure_channel(target) as channel:
        return [answer async for answer in channel.unary_stream("/tramontane.v1.Serving/GenerateStream")(body)]


BAD_CALLS = {
    "malformed": (lambda s, t: send_raw(s, t, "Generate", b"\xff\xff\xff"), Code.INVALID_ARGUMENT, "3 bytes"),
    "malformed stream": (lambda s, t: send_raw_stream(s, t, b"\x1a\xff"), Code.INVALID_ARGUMENT, "2 bytes"),
    "malformed UTF-8": (lambda s, t: send_raw(s, t, "Generate", b"\x1a\x02\xff\xff"), Code.INVALID_ARGUMENT, "bytes"),
    "unknown method": (lambda s, t: send_raw(s, t, "Generat", b""), Code.UNIMPLEMENTED, "not found"),
    "too large": (lambda s, t: s.Generate(ask("x" * (5 << 20))), Code.INVALID_ARGUMENT, "4194304"),
    "far too large": (lambda s, t: s.Generate(ask("x" * (9 << 20))), Code.RESOURCE_EXHAUSTED, "8388608"),
    "no prompt": (lambda s, t: s.Generate(pb.GenerateRequest()), Code.INVALID_ARGUMENT, "prompt is missing"),
    "empty prompt": (lambda s, t: s.Generate(ask("")), Code.INVALID_ARGUMENT, "text is empty"),
    "long prompt": (lambda s, t: s.Generate(ask("é" * 5000)), Code.INVALID_ARGUMENT, "4095"),
    "id": (lambda s, t: s.Generate(ask(tokens=pb.TokenIds(ids=[400]))), Code.INVALID_ARGUMENT, "tokens.ids[0]"),
    "nan": (lambda s, t: s.Generate(ask(sampling=pb.Sampling(temperature=math.nan))), Code.INVALID_ARGUMENT, "nan"),
    "model": (lambda s, t: s.Generate(ask(model="other")), Code.NOT_FOUND, "'other'"),
    "model of tokenize": (lambda s, t: s.Tokenize(pb.TokenizeRequest(model="other")), Code.NOT_FOUND, "'other'"),
    "resume": (lambda s, t: s.Generate(ask(resume=pb.Resume())), Code.UNIMPLEMENTED, "resume"),
    "ids to join": (lambda s, t: s.Detokenize(pb.DetokenizeRequest(ids=[400])), Code.INVALID_ARGUMENT, "ids[0]"),
    "too many": (lambda s, t: s.Detokenize(pb.DetokenizeRequest(ids=[5] * 5000)), Code.INVALID_ARGUMENT, "4096"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
async def test_a_bad_call_gets_its_status_and_the_next_is_served(name):
    call, code, words = BAD_CALLS[name]
    pipeline = FakePipeline()
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        error = await failure(call(stub, target))
        assert error.code() == code
        assert words in error.details()
        assert "Error" not in error.details(), "a class's name is no answer"
        assert not pipeline.submitted, "refused work reached a pipeline"
        assert (await stub.Generate(ask())).finished.usage.completion_tokens == 8


ENDS = {
    EndReason.REFUSED: Code.RESOURCE_EXHAUSTED,
    EndReason.DEADLINE: Code.DEADLINE_EXCEEDED,
    EndReason.BROKEN: Code.UNAVAILABLE,
    EndReason.NOT_FINITE: Code.INTERNAL,
}


@pytest.mark.parametrize("detail", ["", "a sentence of the router's"])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("reason", list(ENDS))
async def test_a_request_that_the_pipeline_cannot_finish_ends_alone(reason, tokens, detail):
    pipeline = FakePipeline(reply=lambda submit: [300] * tokens, end=reason, detail=detail)
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        error = await failure(stub.Generate(ask(request_id="mine")))
        assert error.code() == ENDS[reason]
        assert len(error.details()) > 10
        assert detail in error.details()
        details = details_of(error)
        assert details[error_details_pb2.RequestInfo].request_id == "mine"
        assert (error_details_pb2.RetryInfo in details) == (reason is EndReason.REFUSED)
        pipeline.reply = lambda submit: [300] * 8
        assert (await stub.Generate(ask())).finished.usage.completion_tokens == 8


async def test_a_bad_field_is_named_in_the_status():
    async with serving() as (_, target), stub_of(target) as stub:
        error = await failure(stub.Generate(ask(request_id="mine", sampling=pb.Sampling(top_p=2.0))))
        details = details_of(error)
        (violation,) = details[error_details_pb2.BadRequest].field_violations
        assert violation.field == "sampling.top_p"
        assert "above 0 and at most 1; it is 2" in violation.description
        assert details[error_details_pb2.RequestInfo].request_id == "mine"


async def test_a_mistake_of_our_own_is_internal_and_names_no_class(caplog):
    pipeline = FakePipeline()
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        pipeline.reply = None
        broken_submit, pipeline.submit = pipeline.submit, None
        error = await failure(stub.Generate(ask()))
        assert (error.code(), "TypeError" in error.details()) == (Code.INTERNAL, False)
        assert "TypeError" in caplog.text
        pipeline.submit, pipeline.reply = broken_submit, lambda submit: [300] * 8
        assert (await stub.Generate(ask())).finished.usage.completion_tokens == 8


# Leaving early, and reading late


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

    pipeline = FakePipeline()
    pipeline.running.clear()
    offer = Offer("tiny", lambda: None)
    offer.set_model(tiny_model(tokenizer=tiny_tokenizer()))
    await offer.set_routes(1, [pipeline])
    servicer = Servicer(offer, fake_stats)
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
    pipeline = FakePipeline(reply=lambda submit: [*ids * 3000, *end, *ids * 1000])
    model = tiny_model(context=100_000, tokenizer=tiny_tokenizer())
    async with serving(pipeline, model=model) as (_, target), stub_of(target, **SMALL_WINDOW) as stub:
        call = stub.GenerateStream(ask(stopping=pb.Stopping(max_tokens=90_000, strings=["END"])))
        events = [await call.read()]
        await eventually(lambda: not pipeline.open)
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        assert events[-1].finished.reason == pb.STOP_STRING
        assert "".join(event.delta.text for event in events).count("many words go on ") == 3000


async def test_a_large_text_is_tokenized_beside_the_event_loop():
    model = tiny_model(tokenizer=tiny_tokenizer())
    go_on = threading.Event()

    class Slow:
        """Encodes when told to."""

        size, eos_id, bos_id = model.tokenizer.size, 2, 1

        def encode(self, text: str, *, add_bos: bool) -> list[int]:
            assert len(text) < 5000 or go_on.wait(30)
            return [5]

        def __getattr__(self, name: str) -> object:
            return getattr(model.tokenizer, name)

    async with serving(model=tiny_model(tokenizer=Slow())) as (_, target), stub_of(target) as stub:
        large = asyncio.ensure_future(generate(stub, "x" * 5000))
        small = await asyncio.wait_for(stub.Generate(ask("small")), 20)
        assert small.finished.usage.completion_tokens == 8
        assert not large.done()
        go_on.set()
        assert (await large).finished.usage.completion_tokens == 8


async def generate(stub: pb_grpc.ServingStub, text: str) -> pb.GenerateResponse:
    return await stub.Generate(ask(text))


# What the gateway says of itself


async def test_health_follows_the_gateway_s_life():
    gateway = Gateway("gateway-0", "tiny", context=4096, fetch_stats=fake_stats)
    port = await gateway.start("127.0.0.1", 0)
    target = f"127.0.0.1:{port}"
    pipeline = FakePipeline()
    async with stub_of(target) as stub:
        for service in SERVICES:
            assert await health_of(target, service) == NOT_SERVING
        gateway.set_loading(0.439)
        for call in (
            stub.Generate(ask()),
            stub.Tokenize(pb.TokenizeRequest()),
            stub.ListModels(pb.ListModelsRequest()),
        ):
            error = await failure(call)
            assert (error.code(), error.details()) == (Code.UNAVAILABLE, "loading, 43 %")
        assert (await failure(stub.Generate(ask(model="other")))).code() == Code.NOT_FOUND
        assert (await stub.GetStats(pb.GetStatsRequest())).processes

        gateway.set_model(tiny_model(tokenizer=tiny_tokenizer()))
        assert await health_of(target, "") == NOT_SERVING
        await gateway.set_routes(1, [pipeline])
        for service in SERVICES:
            assert await health_of(target, service) == SERVING
        assert (await failure(health_of(target, "tramontane.v1.Serving/other"))).code() == Code.NOT_FOUND

        gateway.drain()
        for service in SERVICES:
            assert await health_of(target, service) == NOT_SERVING
        error = await failure(stub.Generate(ask()))
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "the server is shutting down")
    await gateway.close(0.0)


async def test_those_who_watch_health_hear_of_each_change():
    pipeline = FakePipeline()
    async with serving(pipeline) as (gateway, target), grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        heard = []

        async def watch() -> None:
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(service="tramontane.v1.Serving/tiny")):
                heard.append(answer.status)

        watching = asyncio.ensure_future(watch())
        await eventually(lambda: heard == [SERVING])
        pipeline.break_down("stage 1 died")
        await eventually(lambda: heard == [SERVING, NOT_SERVING])
        await gateway.set_routes(2, [FakePipeline()])
        await eventually(lambda: heard == [SERVING, NOT_SERVING, SERVING])
        gateway.set_unavailable("recovery failed")
        await eventually(lambda: heard == [SERVING, NOT_SERVING, SERVING, NOT_SERVING])
        await gateway.close(0.0)
        await asyncio.wait_for(watching, 30)


async def test_a_pipeline_that_breaks_ends_its_requests_and_only_the_last_turns_health():
    first, second = FakePipeline(name="a"), FakePipeline(name="b", outstanding_tokens=1)
    first.running.clear()
    async with serving(first, second) as (_, target), stub_of(target) as stub:
        waiting = asyncio.ensure_future(failure(generate(stub, "a")))
        await eventually(lambda: first.open)
        first.break_down("stage 1 died")
        error = await waiting
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "stage 1 died")
        assert await health_of(target, "") == SERVING
        assert (await stub.Generate(ask())).finished.usage.completion_tokens == 8
        second.break_down("stage 0 died")
        assert await health_of(target, "") == NOT_SERVING
        error = await failure(stub.Generate(ask()))
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "b broke: stage 0 died")


async def test_requests_go_to_the_less_busy_of_two_pipelines():
    busy, idle = FakePipeline(name="busy", outstanding_tokens=10), FakePipeline(name="idle", outstanding_tokens=9)
    async with serving(busy, idle) as (_, target), stub_of(target) as stub:
        for _ in range(10):
            await stub.Generate(ask())
        assert (len(busy.submitted), len(idle.submitted)) == (0, 10)
        busy.outstanding_tokens = 0
        await stub.Generate(ask())
        assert len(busy.submitted) == 1


async def test_with_many_pipelines_all_but_the_busiest_get_requests():
    pipelines = [FakePipeline(name=str(load), outstanding_tokens=load) for load in range(4)]
    async with serving(*pipelines) as (_, target), stub_of(target) as stub:
        for _ in range(200):
            await stub.Generate(ask(stopping=pb.Stopping(max_tokens=1)))
        counts = [len(pipeline.submitted) for pipeline in pipelines]
        assert counts[3] == 0, "the busiest is never the better of two"
        assert min(counts[:3]) > 0, "always taking the least busy sends every request to one, until its load is known"


async def test_older_routes_are_ignored_and_newer_ones_let_running_requests_end():
    old, stale, new = FakePipeline(name="old"), FakePipeline(name="stale"), FakePipeline(name="new")
    old.running.clear()
    async with serving(old) as (gateway, target), stub_of(target) as stub:
        running = asyncio.ensure_future(generate(stub, "a"))
        await eventually(lambda: old.open)
        await gateway.set_routes(1, [stale])
        assert stale.broken.done(), "a pipeline that came with older routes stays open"
        await gateway.set_routes(2, [new])
        assert old.retired
        await stub.Generate(ask())
        assert (len(old.submitted), len(stale.submitted), len(new.submitted)) == (1, 0, 1)
        old.running.set()
        assert (await running).finished.usage.completion_tokens == 8
        old.break_down("no longer in use")
        await asyncio.sleep(0)
        assert await health_of(target, "") == SERVING


async def test_close_lets_requests_end_within_the_grace():
    pipeline = FakePipeline(pause_s=0.01)
    async with serving(pipeline) as (gateway, target), stub_of(target) as stub:
        running = asyncio.ensure_future(generate(stub, "a"))
        await eventually(lambda: pipeline.open)
        await gateway.close(30.0)
        assert (await running).finished.usage.completion_tokens == 8


async def test_close_ends_the_rest_with_a_status():
    pipeline = FakePipeline()
    pipeline.running.clear()
    async with serving(pipeline) as (gateway, target), stub_of(target) as stub:
        running = asyncio.ensure_future(failure(generate(stub, "a")))
        await eventually(lambda: pipeline.open)
        await gateway.close(0.05)
        error = await running
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "the server is shutting down")
        assert pipeline.cancelled == [0]
        assert pipeline.broken.done()


async def test_a_port_in_use_is_an_error_that_names_it():
    async with serving() as (_, target):
        other = Gateway("gateway-1", "tiny", context=4096, fetch_stats=fake_stats)
        try:
            with pytest.raises(OSError, match=rf"cannot listen on {target}: Address already in use"):
                await other.start("127.0.0.1", int(target.rpartition(":")[2]))
            with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid:1: "):
                await other.start("no.such.host.invalid", 1)
            assert await other.start("127.0.0.1", 0) > 0
        finally:
            await other.close(0.0)


async def test_logs_name_requests_and_never_their_text(caplog):
    caplog.set_level(logging.DEBUG, logger="tramontane")
    pipeline = FakePipeline(reply=says("reply secret"))
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        await stub.Generate(ask("prompt secret", request_id="mine", stopping=pb.Stopping(max_tokens=9, strings=["x"])))
        await failure(stub.Generate(ask("secret " * 4000, request_id="yours")))
        await failure(stub.Generate(ask("a", stopping=pb.Stopping(strings=["secret" * 100]))))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("tramontane")]
    assert sum("request mine:" in line for line in lines) == 2
    assert sum("request yours: INVALID_ARGUMENT" in line for line in lines) == 1
    assert "secret" not in caplog.text
