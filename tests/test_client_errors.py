"""What goes wrong in a call, and how it reaches the caller: statuses, their details, contradicting servers."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_server import delta, events, finished, refuse, started
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RequestInfo, RetryInfo

from tramontane.client import (
    AsyncClient,
    Client,
    ClientOptions,
    FieldViolation,
    ProtocolError,
    StatusError,
    TramontaneError,
    errors,
)
from tramontane.protos import serving_pb2

Event = serving_pb2.GenerateEvent


STATUSES = {
    "ABORTED": errors.Aborted,
    "ALREADY_EXISTS": errors.UnknownStatus,
    "CANCELLED": errors.Cancelled,
    "DATA_LOSS": errors.UnknownStatus,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "INTERNAL": errors.Internal,
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "NOT_FOUND": errors.NotFound,
    "OUT_OF_RANGE": errors.UnknownStatus,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "UNAVAILABLE": errors.Unavailable,
    "UNIMPLEMENTED": errors.Unimplemented,
    "UNKNOWN": errors.UnknownStatus,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK], ids=str)
async def test_each_status_has_its_class_in_both_clients(server, code):
    server.plans += [refuse(code, "no\nway"), refuse(code, "no\nway")]
    options = ClientOptions(attempts=1)
    with Client(server.target, options) as client, pytest.raises(StatusError) as blocking:
        client.generate("a", request_id="r-1")
    async with AsyncClient(server.target, options) as client:
        with pytest.raises(StatusError) as awaited:
            await client.generate("a", request_id="r-1")
    for caught in (blocking.value, awaited.value):
        assert type(caught) is STATUSES[code.name]
        assert (caught.request_id, caught.retry_after_s, caught.violations) == ("r-1", None, ())
        assert "no\nway" in caught.message


async def test_details_of_a_status(server, client):
    plan = refuse(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "full",
        RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)),
        BadRequest(field_violations=[BadRequest.FieldViolation(field="sampling.top_p", description="must be more")]),
        RequestInfo(request_id="from-the-server"),
    )
    server.plans += [plan, plan]
    async with AsyncClient(server.target) as other:
        for caught in (
            await _error(other.generate("a", timeout_s=2)),  # sooner than it might be tried again
            await _error(asyncio.to_thread(client.generate, "a", timeout_s=2)),
        ):
            assert isinstance(caught, errors.ResourceExhausted)
            assert caught.retry_after_s == 2.5
            assert caught.violations == (FieldViolation(field="sampling.top_p", description="must be more"),)
            assert caught.request_id == "from-the-server"
            assert str(caught) == "full (request from-the-server)"


async def _error(awaitable) -> TramontaneError:
    with pytest.raises(TramontaneError) as caught:
        await awaitable
    return caught.value


def test_damaged_details_do_not_hide_the_status(server, client):
    def plan(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad")
        yield

    server.plans.append(plan)
    with pytest.raises(errors.InvalidArgument, match="bad"):
        client.generate("a")


def first(request) -> Event:
    return Event(started=started(request), delta=delta(0, 97))


CONTRADICTIONS = {
    "a gap": ([first, lambda _: Event(delta=delta(2, 99))], "offset 2 after 1 tokens"),
    "a repetition": ([first, lambda _: Event(delta=delta(0, 97))], "offset 0 after 1 tokens"),
    "no start": ([lambda _: Event(delta=delta(0, 97))], "did not say what was started"),
    "two starts": ([first, first], "started twice"),
    "no end": ([first], "ended after 1 tokens without its last event"),
    "nothing": ([], "ended after 0 tokens without its last event"),
    "a wrong count": ([first, lambda _: Event(finished=finished(1, 2))], "counts 2 tokens, and 1 came"),
    "no reason": ([first, lambda _: Event(finished=finished(1, 1, serving_pb2.FINISH_REASON_UNSPECIFIED))], "reason"),
    "more after the end": (
        [first, lambda _: Event(finished=finished(1, 1)), lambda _: Event(delta=delta(1, 98))],
        "after the last one",
    ),
    "another request": (
        [lambda _: Event(started=serving_pb2.Started(request_id="other", seed=1), delta=delta(0, 97))],
        "'other'",
    ),
    "missing log probabilities": (
        [lambda request: Event(started=started(request), delta=serving_pb2.Delta(token_ids=[97]))],
        "0 log probabilities",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
async def test_contradictions_raise_and_cancel(server, client, case):
    makers, says = CONTRADICTIONS[case]
    server.plans += [events(*makers), events(*makers)]
    with pytest.raises(ProtocolError, match=says) as caught:
        client.generate("a", request_id="r-1")
    assert caught.value.request_id == "r-1"
    async with AsyncClient(server.target) as other:
        with pytest.raises(ProtocolError, match=says):
            await other.generate("a")
