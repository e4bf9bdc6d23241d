"""A gateway from its start to its end: health, routes, broken pipelines, its port and its log."""

from __future__ import annotations

import asyncio
import logging
import re

import grpc
import pytest
from calls import (
    NOT_SERVING,
    SERVICES,
    SERVING,
    Code,
    ask,
    eventually,
    failure,
    generate,
    health_of,
    says,
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
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tramontane.client import AsyncClient
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.gateway import Gateway
from tramontane.protos import serving_pb2 as pb


async def test_health_follows_the_gateway_s_life(caplog):
    gateway = Gateway("gateway-0", "tiny", context=4096, fetch_stats=fake_stats, dial=dial_fake)
    port = await gateway.start(Entrance())
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
        await gateway.set_routes(1, routes_to(pipeline))
        for service in SERVICES:
            assert await health_of(target, service) == SERVING
        assert (await failure(health_of(target, "tramontane.v1.Serving/other"))).code() == Code.NOT_FOUND

        gateway.drain()
        for service in SERVICES:
            assert await health_of(target, service) == NOT_SERVING
        error = await failure(stub.Generate(ask()))
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "the server is shutting down")
    await gateway.close(0.0)
    assert "Traceback" not in caplog.text, "a refusal was taken for a mistake of our own"


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
        await gateway.set_routes(2, routes_to(FakePipeline()))
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
        assert error.code() == Code.UNAVAILABLE
        assert error.details() == "no pipeline is linked: a: stage 1 died; b: stage 0 died"


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
        await gateway.set_routes(1, routes_to(stale))
        await gateway.set_routes(2, routes_to(new))
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


async def test_a_request_without_tokens_goes_on_at_another_gateway():
    first, second = FakePipeline(name="a"), FakePipeline(name="b")
    first.running.clear()
    async with (
        serving(first) as (leaving, one),
        serving(second) as (_, two),
        AsyncClient(f"ipv4:{one},{two}") as client,
    ):
        calls = []
        while not first.open:
            calls.append(asyncio.create_task(client.generate("a summer", max_tokens=3)))
            await asyncio.sleep(0.05)
        await leaving.close(0.05)
        assert [len((await call).token_ids) for call in calls] == [3] * len(calls)
        assert len(second.submitted) == len(calls)


async def test_a_port_in_use_is_an_error_that_names_it():
    async with serving() as (_, target):
        other = Gateway("gateway-1", "tiny", context=4096, fetch_stats=fake_stats, dial=dial_fake)
        try:
            with pytest.raises(OSError, match=rf"cannot listen on {target}: Address already in use"):
                await other.start(Entrance(port=int(target.rpartition(":")[2])))
            with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid:1: "):
                await other.start(Entrance(host="no.such.host.invalid", port=1))
            assert await other.start(Entrance()) > 0
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
    mine = [line for line in lines if "request mine:" in line]
    assert [re.sub(r"[0-9.]+ ms", "_ ms", line) for line in mine] == [
        "request mine: OK, LENGTH, 11 prompt and 9 completion tokens, "
        "queue _ ms, prefill _ ms, decode _ ms, all _ ms, fake"
    ]
    assert sum("request yours: INVALID_ARGUMENT" in line for line in lines) == 1
    assert "secret" not in caplog.text
