"""What a request gets from a gateway, over a real gRPC channel, and what is refused."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import grpc
import pytest
from calls import (
    Code,
    ask,
    details_of,
    events_of,
    eventually,
    failure,
    says,
    stub_of,
)
from fake_pipeline import (
    LOG_PROBABILITY,
    FakePipeline,
    serving,
    tiny_model,
    tiny_tokenizer,
)
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from tramontane.client import AsyncClient, errors
from tramontane.cluster.messages import EndReason
from tramontane.cluster.request_size import largest_field
from tramontane.protos import serving_pb2 as pb
from tramontane.protos import serving_pb2_grpc as pb_grpc

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
        assert [first.started.seed, second.started.seed] == [submit.sampling.seed for submit in pipeline.submitted]
        assert first.started.seed != second.started.seed
        assert pipeline.submitted[0].remaining_ms is None
        await stub.Generate(ask(), timeout=60)
        assert 0 < pipeline.submitted[-1].remaining_ms < 61_000, "grpc rounds a timeout up"


@pytest.mark.parametrize("min_tokens", [0, 12])
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
        assert whole.started.ids_only
        for call in (stub.Generate(ask("text")), stub.Tokenize(pb.TokenizeRequest(text="a"))):
            error = await failure(call)
            assert (error.code(), "needs a tokenizer" in error.details()) == (Code.INVALID_ARGUMENT, True)
        (model,) = (await stub.GetStats(pb.GetStatsRequest())).models
        assert not model.has_tokenizer


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
    held_in_8_bits = replace(tiny_model(), quantization="int8")
    async with serving(model=held_in_8_bits) as (gateway, target), stub_of(target) as stub:
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.context_tokens, model.window_tokens, model.serving) == ("tiny", 4096, 8, True)
        assert (model.quantization, model.has_tokenizer, model.reason) == ("int8", False, "")
        stats = await stub.GetStats(pb.GetStatsRequest())
        assert list(stats.models) == [model]
        gateway.set_unavailable("a stage is gone")
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.serving, model.reason) == (False, "a stage is gone")
        assert (stats.processes[0].role, stats.processes[0].pid, stats.stages[0].busy_ns) == ("gateway", 7, 5)
        assert list(stats.routers[0].kv_blocks_total) == [10, 20]
        admission = stats.routers[0].admission
        assert (admission.refused_deadline, admission.estimated_wait_s, admission.seats) == (3, 0.5, 4)
        assert not admission.HasField("prompt_row_s")
        assert len(stats.gateways[0].refusal_counts) == len(stats.gateways[0].refusal_bounds_s)
        assert (stats.gateways[0].open_calls, stats.gateways[0].recent_own_stall_ms) == (1, 7.0)


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
    "too large": (lambda s, t: s.Generate(ask("x" * (5 << 20))), Code.INVALID_ARGUMENT, "327680"),
    "far too large": (lambda s, t: s.Generate(ask("x" * (9 << 20))), Code.RESOURCE_EXHAUSTED, "8388608"),
    "no prompt": (lambda s, t: s.Generate(pb.GenerateRequest()), Code.INVALID_ARGUMENT, "prompt is missing"),
    "empty prompt": (lambda s, t: s.Generate(ask("")), Code.INVALID_ARGUMENT, "text is empty"),
    "long prompt": (lambda s, t: s.Generate(ask("é" * 5000)), Code.INVALID_ARGUMENT, "4095"),
    "id": (lambda s, t: s.Generate(ask(tokens=pb.TokenIds(ids=[400]))), Code.INVALID_ARGUMENT, "tokens.ids[0]"),
    "nan": (lambda s, t: s.Generate(ask(sampling=pb.Sampling(temperature=math.nan))), Code.INVALID_ARGUMENT, "nan"),
    "model": (lambda s, t: s.Generate(ask(model="other")), Code.NOT_FOUND, "'other'"),
    "model of tokenize": (lambda s, t: s.Tokenize(pb.TokenizeRequest(model="other")), Code.NOT_FOUND, "'other'"),
    "text to cut": (lambda s, t: s.Tokenize(pb.TokenizeRequest(text="é" * 5000)), Code.INVALID_ARGUMENT, "4096"),
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


async def test_tokens_that_came_before_a_failure_reach_the_client():
    pipeline = FakePipeline(reply=lambda submit: [300, 301, 302], end=EndReason.BROKEN)
    async with serving(pipeline) as (_, target), stub_of(target) as stub:
        call, ids = stub.GenerateStream(ask()), []

        async def collect() -> None:
            async for event in call:
                ids.extend(event.delta.token_ids)

        assert (await failure(collect())).code() == Code.UNAVAILABLE
        assert ids == [300, 301, 302]


async def test_a_bad_field_is_named_in_the_status():
    async with serving() as (_, target), stub_of(target) as stub:
        error = await failure(stub.Generate(ask(request_id="mine", sampling=pb.Sampling(top_p=2.0))))
        details = details_of(error)
        (violation,) = details[error_details_pb2.BadRequest].field_violations
        assert violation.field == "sampling.top_p"
        assert "above 0 and at most 1; it is 2" in violation.description
        assert details[error_details_pb2.RequestInfo].request_id == "mine"


@pytest.mark.parametrize("size", [1_000_000, 10_000_000])
async def test_a_request_that_is_too_large_names_its_field(size):
    """Up to 8 MiB the gateway says so; beyond, gRPC does, and the client knows what it sent."""
    async with serving() as (_, target), AsyncClient(target) as client:
        for call, field in (
            (client.generate("a" * size, request_id="mine"), "text"),
            (client.generate([300] * (size // 2)), "tokens.ids"),
            (client.tokenize("a" * size), "text"),
        ):
            with pytest.raises((errors.InvalidArgument, errors.ResourceExhausted)) as raised:
                await call
            assert [violation.field for violation in raised.value.violations] == [field]
            assert field in raised.value.message
            assert str(size)[:4] in raised.value.message, "its whole size"


async def test_a_call_without_a_field_for_its_name_is_named_by_metadata():
    async with serving() as (_, target), stub_of(target) as stub:
        request = pb.TokenizeRequest(text="a", model="other")
        error = await failure(stub.Tokenize(request, metadata=(("x-request-id", "mine"),)))
        assert details_of(error)[error_details_pb2.RequestInfo].request_id == "mine"
        error = await failure(stub.Tokenize(request, metadata=(("x-request-id", "a" * 200),)))
        assert error_details_pb2.RequestInfo not in details_of(error)


@given(st.binary(max_size=200))
def test_no_bytes_trouble_the_search_for_the_largest_field(body):
    largest_field("/tramontane.v1.Serving/Generate", body)


def test_a_request_of_many_small_fields_is_not_searched_to_its_end():
    assert largest_field("/tramontane.v1.Serving/Detokenize", b"\x10\x01" * 400_000 + b"broken") == "ids"
    assert largest_field("/grpc.health.v1.Health/Check", b"\x0a\x01a") is None


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
