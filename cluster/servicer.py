"""The service that users call: each method validates once, and hands on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import grpc

from tramontane.cluster.completion import Clock, Completion
from tramontane.cluster.errors import CallError, without_frames
from tramontane.cluster.offer import Offer
from tramontane.cluster.pipeline import Pipeline, broken_end
from tramontane.cluster.request_line import RequestLine
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.stats import ServiceStats
from tramontane.cluster.text import detokenize_in_steps
from tramontane.cluster.tokenizer import Tokenizer, TooLong
from tramontane.cluster.tokenizing import Tokenizing
from tramontane.cluster.users import Users
from tramontane.cluster.validation import (
    InvalidField,
    Request,
    choose_request_id,
    validate_ids,
    validate_in_steps,
)
from tramontane.protos import serving_pb2 as pb
from tramontane.protos import serving_pb2_grpc as pb_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Send: TypeAlias = Callable[[pb.GenerateEvent], Awaitable[None]]


class Servicer(pb_grpc.ServingServicer):
    """Methods raise `CallError`; the interceptor makes a status of it."""

    def __init__(self, offer: Offer, users: Users, fetch_stats: Callable[[], Awaitable[ServiceStats]]) -> None:
        self._offer = offer
        self._users = users
        self._fetch_stats = fetch_stats
        self._tokenizing = Tokenizing()
        self._numbers = itertools.count()
        self._open: dict[int, tuple[Pipeline, Completion]] = {}
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Collect the stream."""
        response, text = pb.GenerateResponse(), []

        async def collect(event: pb.GenerateEvent) -> None:
            if event.HasField("started"):
                response.started.CopyFrom(event.started)
            if event.HasField("finished"):
                response.finished.CopyFrom(event.finished)
            text.append(event.delta.text)
            response.completion.token_ids.extend(event.delta.token_ids)
            response.completion.log_probabilities.extend(event.delta.log_probabilities)

        generating = self._generate(request, context, collect)
        del request  # a text of megabytes is not kept while its completion is generated
        await generating
        response.completion.text = "".join(text)
        return response

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Write events as they come. (Not a generator: a write that blocks is then ended by CancelledError alone.)"""
        generating = self._generate(request, context, context.write)
        del request  # as above
        await generating

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """As a prompt is tokenized."""
        model, tokenizer = self._tokenizer(request, "text")
        add_bos = request.add_bos if request.HasField("add_bos") else True
        steps = tokenizer.encode_in_steps(request.text, add_bos=add_bos, most=model.context)
        try:
            ids = await self._tokenizing.run(self._users.of(context), request.ByteSize(), steps)
        except TooLong as error:
            mistake = InvalidField("text", f"may be {model.context} tokens, the context; it is {error.tokens}")
            raise _invalid(mistake) from without_frames(error)
        return pb.TokenizeResponse(ids=ids.tolist())

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """As a completion's ids become text."""
        model, _ = self._tokenizer(request, "ids")
        if len(request.ids) > model.context:
            raise _invalid(InvalidField("ids", f"may be {model.context}, the context; it has {len(request.ids)}"))
        try:
            ids = validate_ids("ids", request.ids, model.vocabulary.rows).tolist()
        except InvalidField as error:
            raise _invalid(error) from error
        steps = detokenize_in_steps(model.vocabulary, ids, continuation=request.continuation)
        return pb.DetokenizeResponse(
            text=await self._tokenizing.run(self._users.of(context), request.ByteSize(), steps)
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """The one that is loaded, serving or not."""
        self._offer.require(None)
        return pb.ListModelsResponse(models=self._offer.infos())

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:  # noqa: N802
        """What the service's parts say of themselves."""
        try:
            stats = await self._fetch_stats()
        except ConnectionError as error:
            raise CallError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        return pb.GetStatsResponse(
            models=self._offer.infos(),
            late=stats.late,
            processes=[pb.ProcessStats(**asdict(process)) for process in stats.processes],
            stages=[pb.StageStats(**asdict(stage)) for stage in stats.stages],
            routers=[pb.RouterStats(**asdict(router)) for router in stats.routers],
            gateways=[pb.GatewayStats(**asdict(gateway)) for gateway in stats.gateways],
        )

    @property
    def tokenizing_bytes(self) -> int:
        """Of requests that wait to be tokenized, or are being tokenized, now."""
        return self._tokenizing.held_bytes

    async def wait_idle(self) -> None:
        """Wait until no generation is going on."""
        await self._idle.wait()

    def end_all(self, reason: str) -> None:
        """End every generation with UNAVAILABLE; clients may try another gateway."""
        for number, (pipeline, completion) in self._open.items():
            pipeline.cancel(number)
            completion.leave(broken_end(number, reason))

    def close(self) -> None:
        """Let the threads go."""
        self._tokenizing.close()

    async def _generate(self, message: pb.GenerateRequest, context: Context, send: Send) -> None:
        """Serve one request until its end, its deadline or its client's leaving, and say in the log which it was."""
        request_id = choose_request_id(message)
        arrived_s, remaining_s = _now(), context.time_remaining()
        deadline_s = None if remaining_s is None else arrived_s + remaining_s
        line = RequestLine(request_id, arrived_s)
        self._calls += 1
        self._idle.clear()
        try:
            async with asyncio.timeout_at(deadline_s):
                model = self._offer.require(message.model if message.HasField("model") else None)
                admitting = self._admit(message, model, request_id, self._users.of(context))
                del message
                request = await admitting
                reason = await self._complete(request, model, arrived_s, deadline_s, send, line)
                line.write(f"OK, {pb.FinishReason.Name(reason)}", _now())
        except CallError as error:
            error.request_id = request_id
            line.write(f"{error.code.name}, {error.message}", _now())
            raise
        except TimeoutError:
            line.write(grpc.StatusCode.DEADLINE_EXCEEDED.name, _now())
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed", request_id=request_id) from None
        except asyncio.CancelledError:
            line.write("CANCELLED, its client left, or its deadline passed", _now())
            raise
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def _admit(self, message: pb.GenerateRequest, model: ServedModel, request_id: str, user: str) -> Request:
        if message.HasField("resume"):
            raise CallError(grpc.StatusCode.UNIMPLEMENTED, "resume is not supported yet", field="resume")
        try:
            steps = validate_in_steps(message, model, request_id)
            return await self._tokenizing.run(user, message.ByteSize(), steps)
        except InvalidField as error:
            raise _invalid(error) from without_frames(error)

    async def _complete(
        self,
        request: Request,
        model: ServedModel,
        arrived_s: float,
        deadline_s: float | None,
        send: Send,
        line: RequestLine,
    ) -> pb.FinishReason:
        """From a pipeline's tokens to the last event. Whatever ends this frees the request at its pipeline."""
        pipeline, number, submitted_s = self._offer.choose(), next(self._numbers), _now()
        remaining_ms = None if deadline_s is None else max(deadline_s - submitted_s, 0.0) * 1e3
        clock = Clock(now=_now, arrived_s=arrived_s, submitted_s=submitted_s)
        completion = Completion(request, model, clock, stop=partial(pipeline.cancel, number, completed=True))
        self._open[number] = pipeline, completion
        line.sent_to(pipeline.name, completion)
        try:
            pipeline.submit(request.submit(number, remaining_ms), completion)
            while not completion.over:
                await completion.wait()
                await send(completion.take())
        finally:
            pipeline.cancel(number)
            del self._open[number]
        assert completion.reason is not None, f"request {request.request_id} is over without a reason"
        return completion.reason

    def _tokenizer(
        self, request: pb.TokenizeRequest | pb.DetokenizeRequest, field: str
    ) -> tuple[ServedModel, Tokenizer]:
        model = self._offer.require(request.model if request.HasField("model") else None)
        if model.tokenizer is None:
            raise _invalid(InvalidField(field, f"needs a tokenizer, and model {model.name!r} has none"))
        return model, model.tokenizer


def _invalid(error: InvalidField) -> CallError:
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, str(error), field=error.field)


def _now() -> float:
    return asyncio.get_running_loop().time()
