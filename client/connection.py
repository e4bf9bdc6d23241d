"""The blocking client's channels, and the threads that find out why calls wait on them.

`async_connection.py` is the same on asyncio. What both decide is in `diagnosis`, `waiting_calls` and `rewording`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
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

IDLE_TICKS = 8
"""A thread that finds no call waiting for so many ticks of `PATIENCE_S` ends; the next call starts another."""


class Server:
    """A target, and the channel for questions to it, which does not wait for the server to serve."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        options.check_target(target)
        self.target, self.options = target, options
        self._credentials = options.tls.credentials() if options.tls else None
        self._channel = self.channel(watch_health=False)
        self.serving = serving_stub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        self.closed = False
        """The client is closed, or is being closed."""

    def channel(self, *, watch_health: bool) -> grpc.Channel:
        """A new channel to the target. It connects at its first call."""
        arguments = self.options.arguments(self.target, watch_health=watch_health)
        if self._credentials is None:
            return grpc.insecure_channel(self.target, arguments)
        return grpc.secure_channel(self.target, self._credentials, arguments)

    def close(self) -> None:
        """Cancel the calls that are under way."""
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
        """The failure of a call, in words that say what to do about it. Asks the server if that helps."""
        failure = reword(failure, request, timeout_s=timeout_s, reason=reason)
        if self.closed:
            return failure
        diagnosis = self.find_out(diagnose(self.target, self.options.tls, failure), self.health)
        return diagnosis.error(failure.request_id) if diagnosis.reason else failure

    def find_out(self, questions: Questions, health: health_pb2_grpc.HealthStub) -> Diagnosis:
        """Put the questions of a diagnosis to the server, `Ask.HEALTH` by this stub."""
        try:
            question = next(questions)
            while True:
                question = questions.send(self._answer(question, health))
        except StopIteration as end:
            diagnosis: Diagnosis = end.value
            return diagnosis

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
    """A channel for generating calls, and a thread that finds out why they wait, as long as some do."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._channel = server.channel(watch_health=True)
        self._serving = serving_stub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._waiting: WaitingCalls[WaitingCall] = WaitingCalls(server.options.reach_timeout_s)
        self._lock = threading.Lock()
        """Guards `_waiting` and the start and end of the thread."""
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def reason(self) -> str:
        """What the calls wait for; empty while nothing is known to be wrong."""
        return self._waiting.reason

    def generate(
        self, request: serving_pb2.GenerateRequest, timeout_s: float
    ) -> grpc.CallIterator[serving_pb2.GenerateEvent]:
        """Start a generating call."""
        options = self._server.options
        call: grpc.CallIterator[serving_pb2.GenerateEvent] = self._serving.GenerateStream(
            request, timeout=timeout_s, metadata=options.metadata(), wait_for_ready=options.wait
        )
        return call

    @contextmanager
    def waits(self, call: WaitingCall) -> Iterator[None]:
        """A block in which this call waits for its first event."""
        if not self._server.options.wait:
            yield
            return
        with self._lock:
            self._waiting.add(call, time.monotonic())
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="tramontane-client", daemon=True)
                self._watcher.start()
        try:
            yield
        finally:
            with self._lock:
                call.waited_for = self._waiting.reason
                self._waiting.remove(call)

    def close(self) -> None:
        """Cancel the calls that are under way."""
        self._closed.set()
        self._channel.close()

    def _watch(self) -> None:
        idle_ticks = 0
        while not self._closed.wait(PATIENCE_S):
            with self._lock:
                idle_ticks = 0 if self._waiting else idle_ticks + 1
                if idle_ticks > IDLE_TICKS:
                    self._watcher = None
                    return
                due = self._waiting.look_due(time.monotonic())
            if due:
                self._look()

    def _look(self) -> None:
        options = self._server.options
        try:
            diagnosis = self._server.find_out(diagnose(self._server.target, options.tls), self._health)
        except ValueError:
            if self._closed.is_set():
                return  # gRPC raises it for a closed channel
            raise
        with self._lock:  # so that no call is given up after its first event
            for call, why in self._waiting.update(diagnosis, time.monotonic()).items():
                call.give_up(why)


class Connections:
    """All channels of one client."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self.server = Server(target, options)
        self._all = [Connection(self.server) for _ in range(options.connections)]
        # next() on a cycle is one step under the interpreter's lock, so that threads may share it.
        self._turns = itertools.cycle(self._all)

    def next(self) -> Connection:
        """The next connection in turn. Raises RuntimeError once the client is closed."""
        if self.server.closed:
            raise RuntimeError(CLOSED)
        return next(self._turns)

    def close(self) -> None:
        """Cancel the calls that are under way and close all connections."""
        self.server.closed = True
        for connection in self._all:
            connection.close()
        self.server.close()  # last, since connections ask by it why their calls wait


def serving_stub(channel: grpc.Channel) -> serving_pb2_grpc.ServingStub:
    """The service's methods on a channel."""
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
