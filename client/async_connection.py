"""The asyncio client's channels: the same as `connection.py`.

What both decide is in `diagnosis`, `waiting_calls` and `rewording`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from tramontane.client import wire
from tramontane.client.arguments import new_request_id
from tramontane.client.channel import REQUEST_ID_KEY, SERVICE, ClientOptions
from tramontane.client.diagnosis import QUESTION_S, Ask, Diagnosis, Look, Questions, diagnose
from tramontane.client.errors import StatusError, from_rpc_error
from tramontane.client.rewording import CLOSED, reword
from tramontane.client.tls_look import Seen, look
from tramontane.client.waiting_calls import PATIENCE_S, WaitingCall, WaitingCalls
from tramontane.protos import serving_pb2, serving_pb2_grpc

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response")
Call: TypeAlias = "grpc.aio.UnaryStreamCall[Any, serving_pb2.GenerateEvent]"


class AsyncServer:
    """A target, and the channel for questions to it, which does not wait for the server to serve."""

    def __init__(self, target: str, options: ClientOptions, credentials: grpc.ChannelCredentials | None) -> None:
        self.target, self.options = target, options
        self._credentials = credentials
        self._channel = self.channel(watch_health=False)
        self.serving = _serving_stub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        self.closed = False
        """The client is closed, or is being closed."""

    def channel(self, *, watch_health: bool) -> grpc.aio.Channel:
        """A new channel to the target. It connects at its first call."""
        arguments = self.options.arguments(self.target, watch_health=watch_health)
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.target, arguments)
        return grpc.aio.secure_channel(self.target, self._credentials, arguments)

    async def close(self) -> None:
        """Cancel the calls that are under way."""
        await self._channel.close(None)

    async def ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float
    ) -> _Response:
        """One call that does not wait. Raises StatusError."""
        request_id = new_request_id()
        try:
            return await method(
                request, timeout=timeout_s, metadata=(*self.options.metadata(), (REQUEST_ID_KEY, request_id))
            )
        except grpc.aio.AioRpcError as error:
            raise await self.explain(from_rpc_error(error, request_id=request_id), request, timeout_s) from None

    async def explain(self, failure: StatusError, request: Message, timeout_s: float, reason: str = "") -> StatusError:
        """The failure of a call, in words that say what to do about it. Asks the server if that helps."""
        failure = reword(failure, request, timeout_s=timeout_s, reason=reason)
        if self.closed:
            return failure
        diagnosis = await self.find_out(diagnose(self.target, self.options.tls, failure), self.health)
        return diagnosis.error(failure.request_id) if diagnosis.reason else failure

    async def find_out(self, questions: Questions, health: health_pb2_grpc.HealthStub) -> Diagnosis:
        """Put the questions of a diagnosis to the server, `Ask.HEALTH` by this stub."""
        try:
            question = next(questions)
            while True:
                question = questions.send(await self._answer(question, health))
        except StopIteration as end:
            diagnosis: Diagnosis = end.value
            return diagnosis

    async def _answer(self, question: Ask | Look, health: health_pb2_grpc.HealthStub) -> Message | StatusError | Seen:
        if isinstance(question, Look):
            return await asyncio.to_thread(look, question.address, self.options.tls)
        metadata = self.options.metadata()
        try:
            if question is Ask.HEALTH:
                answer: Message = await health.Check(
                    wire.health_request(SERVICE), timeout=QUESTION_S, metadata=metadata
                )
            else:
                request = serving_pb2.ListModelsRequest()
                answer = await self.serving.ListModels(request, timeout=QUESTION_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        return answer


class AsyncConnection:
    """A channel for generating calls, and a timer that finds out why they wait, as long as some do."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server
        self._channel = server.channel(watch_health=True)
        self._serving = _serving_stub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._waiting: WaitingCalls[WaitingCall] = WaitingCalls(server.options.reach_timeout_s)
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def reason(self) -> str:
        """What the calls wait for; empty while nothing is known to be wrong."""
        return self._waiting.reason

    def generate(self, request: serving_pb2.GenerateRequest, timeout_s: float) -> Call:
        """Start a generating call."""
        options = self._server.options
        call: Call = self._serving.GenerateStream(
            request, timeout=timeout_s, metadata=options.metadata(), wait_for_ready=options.wait
        )
        return call

    @contextmanager
    def waits(self, call: WaitingCall) -> Iterator[None]:
        """A block in which this call waits for its first event."""
        if not self._server.options.wait:
            yield
            return
        self._waiting.add(call, time.monotonic())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._tick)
        try:
            yield
        finally:
            call.waited_for = self._waiting.reason
            self._waiting.remove(call)

    async def close(self) -> None:
        """Cancel the calls that are under way."""
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()
        await self._channel.close(None)

    def _tick(self) -> None:
        self._timer = None
        if self._server.closed or not self._waiting:
            return
        loop = asyncio.get_running_loop()
        if self._looking is None and self._waiting.look_due(time.monotonic()):
            self._looking = loop.create_task(self._look())
        self._timer = loop.call_later(PATIENCE_S, self._tick)

    async def _look(self) -> None:
        try:
            server = self._server
            diagnosis = await server.find_out(diagnose(server.target, server.options.tls), self._health)
            for call, why in self._waiting.update(diagnosis, time.monotonic()).items():
                call.give_up(why)
        finally:
            self._looking = None


class AsyncConnections:
    """All channels of one client. They belong to the event loop that runs when they are made, as grpc.aio wants it."""

    def __init__(self, target: str, options: ClientOptions, credentials: grpc.ChannelCredentials | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = AsyncServer(target, options, credentials)
        self._all = [AsyncConnection(self.server) for _ in range(options.connections)]
        self._turns = itertools.cycle(self._all)

    def next(self) -> AsyncConnection:
        """The next connection in turn. Raises RuntimeError once the client is closed."""
        if self.server.closed:
            raise RuntimeError(CLOSED)
        return next(self._turns)

    async def close(self) -> None:
        """Cancel the calls that are under way and close all connections."""
        self.server.closed = True
        for connection in self._all:
            await connection.close()
        await self.server.close()  # last, since connections ask by it why their calls wait


def _serving_stub(channel: grpc.aio.Channel) -> serving_pb2_grpc.ServingStub:
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
