"""The asyncio client: `client.py` with `await`, `async for` and `async with`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from tramontane.client import checked, wire
from tramontane.client.arguments import GenerateArguments, Prompt, generate_request_of, shows_generate_arguments
from tramontane.client.async_connection import AsyncConnections, AsyncServer
from tramontane.client.channel import ASK_TIMEOUT_S, GENERATE_TIMEOUT_S, ClientOptions, client_repr
from tramontane.client.diagnosis import Diagnosis
from tramontane.client.errors import Cancelled, StatusError, from_rpc_error
from tramontane.client.retrying import retry_after_s
from tramontane.client.rewording import CLOSED
from tramontane.client.transcript import Transcript, TranscriptView
from tramontane.client.types import Completion, Delta, HealthStatus, ModelInfo, Stats
from tramontane.protos import serving_pb2

OTHER_LOOP = "this AsyncClient belongs to another event loop, that of its first call; make one in each loop"


class AsyncStream(TranscriptView):
    """The deltas of one request, as they come. Leaving its block, or `close`, cancels the request on the server.

    An async context manager and async iterator. `TranscriptView` says what else can be read from it, and when.
    """

    def __init__(self, connections: AsyncConnections, request: serving_pb2.GenerateRequest, timeout_s: float) -> None:
        super().__init__(Transcript(request))
        self._connections = connections
        self._request = request
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._closed = asyncio.Event()
        self._waiting = False
        self._given_up: Diagnosis | None = None
        self.waited_for = ""
        self._start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            StatusError: the call ended with an error; its class says which.
            ProtocolError: the server's events contradict each other; the call is cancelled.
        """
        while True:
            try:
                if self._transcript.begun:
                    delta = await self._read()
                else:
                    with self._connection.waits(self):
                        delta = await self._read()
            except grpc.aio.AioRpcError as error:
                await self._wait_to_retry(await self._failure(error))
            except asyncio.CancelledError:
                # gRPC raises this for a call that we cancelled, too; only a task that is being cancelled may see it.
                if not _task_is_cancelled():
                    raise self._cancelled() from None
                self.close()
                raise
            except BaseException:
                self.close()
                raise
            else:
                if delta is None:
                    raise StopAsyncIteration
                return delta

    def close(self) -> None:
        """Cancel the request; nothing happens once it has ended."""
        if not self._call.done() or self._waiting:
            self._closed.set()
            self._call.cancel()

    def give_up(self, diagnosis: Diagnosis) -> None:
        """End the call with this diagnosis's error. The call's connection calls it."""
        self._given_up = diagnosis
        self._call.cancel()

    @property
    def waiting_for(self) -> str:
        """Why nothing has come yet, a sentence. Empty once something has, and while nothing is known to be wrong."""
        return "" if self._transcript.begun else self._connection.reason

    def _start(self) -> None:
        self._connection = self._connections.next()
        self._call = self._connection.generate(self._request, self._deadline_s - time.monotonic())
        self._events: AsyncIterator[serving_pb2.GenerateEvent] = self._call.__aiter__()

    async def _read(self) -> Delta | None:
        """The next delta; None at the end."""
        async for event in self._events:
            delta = self._transcript.feed(event)
            if delta is not None:
                return delta
        if self._closed.is_set():
            raise asyncio.CancelledError  # as gRPC does at its first read after a cancel
        self._transcript.close()
        return None

    async def _failure(self, error: grpc.aio.AioRpcError) -> StatusError:
        failure = from_rpc_error(error, request_id=self.request_id)
        reason = "" if self._transcript.begun else self.waited_for
        return await self._connections.server.explain(failure, self._request, self._timeout_s, reason)

    def _cancelled(self) -> StatusError:
        if self._given_up is not None:
            return self._given_up.error(self.request_id)
        reason = CLOSED if self._connections.server.closed else "the stream was closed"
        return Cancelled(reason, request_id=self.request_id)

    async def _wait_to_retry(self, error: StatusError) -> None:
        """Start another call when the server will have room; raises the error where there is no other try."""
        retry = self._connections.server.options.retry_refused
        left_s = self._deadline_s - time.monotonic()
        delay_s = retry_after_s(error, begun=self._transcript.begun, left_s=left_s) if retry else None
        if delay_s is None:
            raise error from None
        self._waiting = True
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
            raise Cancelled("the stream was closed", request_id=self.request_id)
        except TimeoutError:
            self._start()
        finally:
            self._waiting = False


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncClient:
    """`Client` on asyncio, with the same arguments and results.

        async with AsyncClient("127.0.0.1:50051") as client:
            async with client.stream("To be, or not to be", max_tokens=32) as stream:
                async for delta in stream:
                    print(delta.text, end="", flush=True)

    May be made anywhere; it belongs to the event loop of its first call, and raises RuntimeError in another one.

    Raises:
        ValueError: an option is out of range, the target cannot be one, or a token would travel in clear.
    """

    def __init__(self, target: str, options: ClientOptions | None = None) -> None:
        self.target = target
        self.options = options or ClientOptions()
        self.options.check_target(target)
        self._credentials = self.options.tls.credentials() if self.options.tls else None
        self._connections: AsyncConnections | None = None
        self._closed = False

    def __repr__(self) -> str:
        return client_repr("AsyncClient", self.target, self.options, closed=self._closed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close all connections.

        Raises:
            RuntimeError: its event loop is another one, which has not been closed.
        """
        connections = self._connections
        elsewhere = connections is not None and connections.loop is not asyncio.get_running_loop()
        if connections is not None and elsewhere and not connections.loop.is_closed():
            raise RuntimeError(OTHER_LOOP)
        self._closed = True
        if connections is not None and not elsewhere:  # nothing goes on in a loop that is closed
            await connections.close()

    @shows_generate_arguments
    def stream(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> AsyncStream:
        """Start generating; iterate over the result for its deltas.

        Raises:
            TypeError, ValueError: something cannot be sent (`generate_request`); no call is made.
        """
        return self._stream("AsyncClient.stream", prompt, timeout_s, arguments)

    @shows_generate_arguments
    async def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Completion:
        """Generate a whole completion: all of `stream`, collected. Raises what an `AsyncStream` does."""
        async with self._stream("AsyncClient.generate", prompt, timeout_s, arguments) as stream:
            async for _ in stream:
                pass
            return stream.completion

    async def tokenize(
        self, text: str, *, add_bos: bool = True, model: str | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> tuple[int, ...]:
        """The model's token ids of a text, as a prompt's; without the BOS on demand. Raises StatusError."""
        with checked.naming("AsyncClient.tokenize"):
            request, seconds = wire.tokenize_request(text, model, add_bos), checked.timeout(timeout_s)
        server = self._server()
        return tuple((await server.ask(server.serving.Tokenize, request, seconds)).ids)

    async def detokenize(
        self,
        ids: Sequence[int],
        continuation: bool = False,
        *,
        model: str | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> str:
        """The text of token ids; as a `continuation` of other text it keeps a leading space. Raises StatusError."""
        with checked.naming("AsyncClient.detokenize"):
            request, seconds = wire.detokenize_request(ids, model, continuation), checked.timeout(timeout_s)
        server = self._server()
        text: str = (await server.ask(server.serving.Detokenize, request, seconds)).text
        return text

    async def models(self, *, timeout_s: float = ASK_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the server offers. Raises StatusError."""
        with checked.naming("AsyncClient.models"):
            seconds = checked.timeout(timeout_s)
        server = self._server()
        return wire.models(
            (await server.ask(server.serving.ListModels, serving_pb2.ListModelsRequest(), seconds)).models
        )

    async def health(self, service: str = "", *, timeout_s: float = ASK_TIMEOUT_S) -> HealthStatus:
        """Whether a server serves at all, or a model does: `tramontane.v1.Serving/MODEL`. Raises StatusError."""
        with checked.naming("AsyncClient.health"):
            request, seconds = wire.health_request(service), checked.timeout(timeout_s)
        server = self._server()
        return wire.health_status(await server.ask(server.health.Check, request, seconds))

    async def stats(self, *, timeout_s: float = ASK_TIMEOUT_S) -> Stats:
        """Counters of all processes of the service. Raises StatusError."""
        with checked.naming("AsyncClient.stats"):
            seconds = checked.timeout(timeout_s)
        server = self._server()
        return wire.stats(await server.ask(server.serving.GetStats, serving_pb2.GetStatsRequest(), seconds))

    def _stream(self, method: str, prompt: Prompt, timeout_s: float, arguments: Mapping[str, Any]) -> AsyncStream:
        with checked.naming(method):
            seconds = checked.timeout(timeout_s)
        request = generate_request_of(method, prompt, arguments)
        return AsyncStream(self._connect(), request, seconds)

    def _server(self) -> AsyncServer:
        return self._connect().server

    def _connect(self) -> AsyncConnections:
        # Only here, inside a running loop: channels of grpc.aio bind to the loop that they are made in.
        if self._closed:
            raise RuntimeError(CLOSED)
        if self._connections is None:
            self._connections = AsyncConnections(self.target, self.options, self._credentials)
        elif self._connections.loop is not asyncio.get_running_loop():
            raise RuntimeError(OTHER_LOOP)
        return self._connections
