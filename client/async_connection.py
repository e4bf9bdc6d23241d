"""`connection.py` on asyncio. What both decide is in `diagnosis`, `waiting_room` and `rewording`."""

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
from tramontane.client.connection import Guest
from tramontane.client.diagnosis import QUESTION_S, Ask, Look, News, Questions, diagnose
from tramontane.client.errors import StatusError, from_rpc_error
from tramontane.client.rewording import CLOSED, reword
from tramontane.client.tls_look import Seen, look
from tramontane.client.waiting_room import PATIENCE_S, WaitingRoom
from tramontane.protos import serving_pb2, serving_pb2_grpc

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response")
Call: TypeAlias = "grpc.aio.UnaryStreamCall[Any, serving_pb2.GenerateEvent]"


class AsyncServer:
    """A target as one channel asks it, whether it serves or not; makes the other channels, too."""

    def __init__(self, target: str, options: ClientOptions, credentials: grpc.ChannelCredentials | None) -> None:
        self.target, self.options = target, options
        self._credentials = credentials
        self._channel = self.channel(watch_health=False)
        self.serving = _serving_stub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        self.closed = False
        """The client is, or is being closed."""

    def channel(self, *, watch_health: bool) -> grpc.aio.Channel:
        """Another channel; it connects at its first call."""
        arguments = self.options.arguments(self.target, watch_health=watch_health)
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.target, arguments)
        return grpc.aio.secure_channel(self.target, self._credentials, arguments)

    async def close(self) -> None:
        """Cancel what is under way."""
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
        """The failure of a call, in words that say what to do about it."""
        failure = reword(failure, request, timeout_s=timeout_s, reason=reason)
        if self.closed:
            return failure
        news = await self.find_out(diagnose(self.target, self.options.tls, failure), self.health)
        return news.error(failure.request_id) if news.reason else failure

    async def find_out(self, questions: Questions, health: health_pb2_grpc.HealthStub) -> News:
        """Put a diagnosis's questions, that of health by this stub's channel."""
        try:
            question = next(questions)
            while True:
                question = questions.send(await self._answer(question, health))
        except StopIteration as end:
            news: News = end.value
            return news

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
    """A channel for generating, and a timer that finds out why calls wait on it, as long as some do."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server
        self._channel = server.channel(watch_health=True)
        self._serving = _serving_stub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._room: WaitingRoom[Guest] = WaitingRoom(server.options.reach_timeout_s)
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def reason(self) -> str:
        """What its calls wait for; empty while nothing is known to be wrong."""
        return self._room.reason

    def generate(self, request: serving_pb2.GenerateRequest, timeout_s: float) -> Call:
        """Start a call."""
        options = self._server.options
        call: Call = self._serving.GenerateStream(
            request, timeout=timeout_s, metadata=options.metadata(), wait_for_ready=options.wait
        )
        return call

    @contextmanager
    def waits(self, guest: Guest) -> Iterator[None]:
        """While this lasts, the guest waits for its first event."""
        if not self._server.options.wait:
            yield
            return
        self._room.enter(guest, time.monotonic())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._tick)
        try:
            yield
        finally:
            guest.waited_for = self._room.reason
            self._room.leave(guest)

    async def close(self) -> None:
        """Cancel what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()
        await self._channel.close(None)

    def _tick(self) -> None:
        self._timer = None
        if self._server.closed or not self._room:
            return
        loop = asyncio.get_running_loop()
        if self._looking is None and self._room.look_due(time.monotonic()):
            self._looking = loop.create_task(self._look())
        self._timer = loop.call_later(PATIENCE_S, self._tick)

    async def _look(self) -> None:
        try:
            news = await self._server.find_out(diagnose(self._server.target, self._server.options.tls), self._health)
            for guest, why in self._room.hear(news, time.monotonic()).items():
                guest.give_up(why)
        finally:
            self._looking = None


class AsyncConnections:
    """All channels of one client. Made in a running loop, and used there alone, as grpc.aio's channels must be."""

    def __init__(self, target: str, options: ClientOptions, credentials: grpc.ChannelCredentials | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = AsyncServer(target, options, credentials)
        self._all = [AsyncConnection(self.server) for _ in range(options.connections)]
        self._turns = itertools.cycle(self._all)

    def next(self) -> AsyncConnection:
        """Whose turn it is. Raises RuntimeError once the client is closed."""
        if self.server.closed:
            raise RuntimeError(CLOSED)
        return next(self._turns)

    async def close(self) -> None:
        """Cancel what is under way and close all connections."""
        self.server.closed = True
        for connection in self._all:
            await connection.close()
        await self.server.close()  # last, since who watches a connection asks it


def _serving_stub(channel: grpc.aio.Channel) -> serving_pb2_grpc.ServingStub:
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
