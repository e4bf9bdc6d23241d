"""Calls to a gateway, as tests make them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from fake_pipeline import (
    tiny_tokenizer,
)
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

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
        while not condition():
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


async def generate(stub: pb_grpc.ServingStub, text: str) -> pb.GenerateResponse:
    return await stub.Generate(ask(text))
