"""The blocking client's connections: what calls go through, and who finds out why they do not.

`async_connection.py` is the same on asyncio. What both decide is in `diagnosis`, `waiting_room` and `rewording`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from tramontane.client import wire
from tramontane.client.arguments import new_request_id
from tramontane.client.channel import REQUEST_ID_KEY, SERVICE, ClientOptions
from tramontane.client.diagnosis import QUESTION_S, Ask, Look, News, Questions, diagnose
from tramontane.client.errors import StatusError, from_rpc_error
from tramontane.client.rewording import CLOSED, reword
from tramontane.client.tls_look import Seen, look
from tramontane.client.waiting_room import PATIENCE_S, WaitingRoom
from tramontane.protos import serving_pb2, serving_pb2_grpc

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response")

IDLE_TICKS = 8
"""A watcher that has had nobody to watch for so many ticks of `PATIENCE_S` ends; the next call starts another."""


class Guest(Protocol):
    """A call that waits for its first event."""

    waited_for: str
    """Why it waited when it stopped waiting; empty where nothing was known to be wrong."""

    def give_up(self, news: News) -> None:
        """End, because of this."""


class Server:
    """A target as one channel asks it, whether it serves or not; makes the other channels, too."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        options.check_target(target)
        self.target, self.options = target, options
        self._credentials = options.tls.credentials() if options.tls else None
        self._channel = self.channel(watch_health=False)
        self.serving = serving_stub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        self.closed = False
        """The client is, or is being closed."""

    def channel(self, *, watch_health: bool) -> grpc.Channel:
        """Another channel; it connects at its first call."""
        arguments = self.options.arguments(self.target, watch_health=watch_health)
        if self._credentials is None:
            return grpc.insecure_channel(self.target, arguments)
        return grpc.secure_channel(self.target, self._credentials, arguments)

    def close(self) -> None:
        """Cancel what is under way."""
        self._channel.close()

    def ask(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float
    ) -> _Response:
        """One call that does not wait. Raises StatusError, and RuntimeError once the client is closed."""
        if self.closed:
            raise RuntimeError(CLOSED)
        request_id = new_request_id()
        try:
            return method(request, timeout=timeout_s, metadata=(*self.options.metadata(), (REQUEST_ID_KEY, request_id)))
        except grpc.RpcError as error:
            raise self.explain(from_rpc_error(error, request_id=request_id), request, timeout_s) from None

    def explain(self, failure: StatusError, request: Message, timeout_s: float, reason: str = "") -> StatusError:
        """The failure of a call, in words that say what to do about it."""
        failure = reword(failure, request, timeout_s=timeout_s, reason=reason)
        if self.closed:
            return failure
        news = self.find_out(diagnose(self.target, self.options.tls, failure), self.health)
        return news.error(failure.request_id) if news.reason else failure

    def find_out(self, questions: Questions, health: health_pb2_grpc.HealthStub) -> News:
        """Put a diagnosis's questions, that of health by this stub's channel."""
        try:
            question = next(questions)
            while True:
                question = questions.send(self._answer(question, health))
        except StopIteration as end:
            news: News = end.value
            return news

    def _answer(self, question: Ask | Look, health: health_pb2_grpc.HealthStub) -> Message | StatusError | Seen:
        if isinstance(question, Look):
            return look(question.address, self.options.tls)
        metadata = self.options.metadata()
        try:
            if question is Ask.HEALTH:
                answer: Message = health.Check(wire.health_request(SERVICE), timeout=QUESTION_S, metadata=metadata)
            else:
                request = serving_pb2.ListModelsRequest()
                answer = self.serving.ListModels(request, timeout=QUESTION_S, metadata=metadata)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        return answer


class Connection:
    """A channel for generating, and a thread that finds out why calls wait on it, as long as some do."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._channel = server.channel(watch_health=True)
        self._serving = serving_stub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._room: WaitingRoom[Guest] = WaitingRoom(server.options.reach_timeout_s)
        self._lock = threading.Lock()
        """Of the room and of the watcher's coming and going."""
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def reason(self) -> str:
        """What its calls wait for; empty while nothing is known to be wrong."""
        return self._room.reason

    def generate(
        self, request: serving_pb2.GenerateRequest, timeout_s: float
    ) -> grpc.CallIterator[serving_pb2.GenerateEvent]:
        """Start a call."""
        options = self._server.options
        call: grpc.CallIterator[serving_pb2.GenerateEvent] = self._serving.GenerateStream(
            request, timeout=timeout_s, metadata=options.metadata(), wait_for_ready=options.wait
        )
        return call

    @contextmanager
    def waits(self, guest: Guest) -> Iterator[None]:
        """While this lasts, the guest waits for its first event."""
        if not self._server.options.wait:
            yield
            return
        with self._lock:
            self._room.enter(guest, time.monotonic())
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="tramontane-client", daemon=True)
                self._watcher.start()
        try:
            yield
        finally:
            with self._lock:
                guest.waited_for = self._room.reason
                self._room.leave(guest)

    def close(self) -> None:
        """Cancel what is under way."""
        self._closed.set()
        self._channel.close()

    def _watch(self) -> None:
        idle_ticks = 0
        while not self._closed.wait(PATIENCE_S):
            with self._lock:
                idle_ticks = 0 if self._room else idle_ticks + 1
                if idle_ticks > IDLE_TICKS:
                    self._watcher = None
                    return
                due = self._room.look_due(time.monotonic())
            if due:
                self._look()

    def _look(self) -> None:
        options = self._server.options
        try:
            news = self._server.find_out(diagnose(self._server.target, options.tls), self._health)
        except ValueError:
            if self._closed.is_set():
                return  # gRPC's word for a closed channel
            raise
        with self._lock:  # none leaves, by its first event, before it is given up
            for guest, why in self._room.hear(news, time.monotonic()).items():
                guest.give_up(why)


class Connections:
    """All channels of one client."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self.server = Server(target, options)
        self._all = [Connection(self.server) for _ in range(options.connections)]
        # next() on a cycle is one step under the interpreter's lock, so that threads may share it.
        self._turns = itertools.cycle(self._all)

    def next(self) -> Connection:
        """Whose turn it is. Raises RuntimeError once the client is closed."""
        if self.server.closed:
            raise RuntimeError(CLOSED)
        return next(self._turns)

    def close(self) -> None:
        """Cancel what is under way and close all connections."""
        self.server.closed = True
        for connection in self._all:
            connection.close()
        self.server.close()  # last, since who watches a connection asks it


def serving_stub(channel: grpc.Channel) -> serving_pb2_grpc.ServingStub:
    """The service's methods on a channel."""
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
