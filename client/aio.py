"""The asyncio client: `client.py` with `await`, `async for` and `async with`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tramontane.client import wire
from tramontane.client.channel import ASK_TIMEOUT_S, GENERATE_TIMEOUT_S, ClientOptions
from tramontane.client.errors import Cancelled, StatusError, from_rpc_error
from tramontane.client.retrying import retry_after_s
from tramontane.client.transcript import Transcript, TranscriptView
from tramontane.client.types import Completion, Delta, HealthStatus, ModelInfo, Stats
from tramontane.client.wire import GenerateArguments, Prompt
from tramontane.protos import serving_pb2, serving_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Start: TypeAlias = "Callable[[float], grpc.aio.UnaryStreamCall[Any, serving_pb2.GenerateEvent]]"


class AsyncStream(TranscriptView):
    """The deltas of one request, as they come. Leaving its block, or `close`, cancels the request on the server.

    An async context manager and async iterator. `TranscriptView` says what else can be read from it, and when.
    """

    def __init__(self, start: _Start, transcript: Transcript, timeout_s: float, *, retry_refused: bool) -> None:
        """`start` makes a call that may take so many seconds."""
        super().__init__(transcript)
        self._start = start
        self._deadline_s = time.monotonic() + timeout_s
        self._retry_refused = retry_refused
        self._closed = asyncio.Event()
        self._waiting = False
        self._call = start(timeout_s)
        self._events: AsyncIterator[serving_pb2.GenerateEvent] = self._call.__aiter__()

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
                async for event in self._events:
                    delta = self._transcript.feed(event)
                    if delta is not None:
                        return delta
                if self._closed.is_set():
                    raise asyncio.CancelledError  # as gRPC does at its first read after a cancel
                self._transcript.close()
            except grpc.aio.AioRpcError as error:
                await self._wait_to_retry(from_rpc_error(error, request_id=self.request_id))
            except asyncio.CancelledError:
                # gRPC raises this for a call that we cancelled, too; only a task that is being cancelled may see it.
                if self._closed.is_set() and not _task_is_cancelled():
                    raise Cancelled("the stream was closed", request_id=self.request_id) from None
                self.close()
                raise
            except BaseException:
                self.close()
                raise
            else:
                raise StopAsyncIteration

    def close(self) -> None:
        """Cancel the request; nothing happens once it has ended."""
        if not self._call.done() or self._waiting:
            self._closed.set()
            self._call.cancel()

    async def _wait_to_retry(self, error: StatusError) -> None:
        """Start another call when the server will have room; raises the error where there is no other try."""
        left_s = self._deadline_s - time.monotonic()
        delay_s = retry_after_s(error, begun=self._transcript.begun, left_s=left_s) if self._retry_refused else None
        if delay_s is None:
            raise error from None
        self._waiting = True
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
            raise Cancelled("the stream was closed", request_id=self.request_id)
        except TimeoutError:
            self._call = self._start(self._deadline_s - time.monotonic())
            self._events = self._call.__aiter__()
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

    May be made anywhere; it belongs to the event loop of its first call.

    Raises:
        ValueError: an option is out of range, or a token would travel in clear.
    """

    def __init__(self, target: str, options: ClientOptions | None = None) -> None:
        self.target = target
        self.options = options or ClientOptions()
        self.options.check_target(target)
        self._metadata = self.options.metadata()
        self._credentials = self.options.tls.credentials() if self.options.tls else None
        self._connections: _Connections | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close all connections."""
        if self._connections is not None:
            await self._connections.close()

    def stream(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> AsyncStream:
        """Start generating; iterate over the result for its deltas. `GenerateArguments` has the keyword arguments.

        Raises:
            TypeError, ValueError: something cannot be sent (`wire.generate_request`); no call is made.
        """
        request = wire.generate_request(prompt, **arguments)

        def start(timeout_s: float) -> grpc.aio.UnaryStreamCall[Any, serving_pb2.GenerateEvent]:
            call: grpc.aio.UnaryStreamCall[Any, serving_pb2.GenerateEvent] = next(
                self._connect().generating
            ).GenerateStream(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=self.options.wait)
            return call

        return AsyncStream(start, Transcript(request), timeout_s, retry_refused=self.options.retry_refused)

    async def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Completion:
        """Generate a whole completion: all of `stream`, collected. Raises what an `AsyncStream` does."""
        async with self.stream(prompt, timeout_s=timeout_s, **arguments) as stream:
            async for _ in stream:
                pass
            return stream.completion

    async def tokenize(
        self, text: str, *, add_bos: bool = True, model: str | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> tuple[int, ...]:
        """The model's token ids of a text, as a prompt's; without the BOS on demand. Raises StatusError."""
        request = wire.tokenize_request(text, model, add_bos)
        return tuple((await self._ask(self._connect().asking.Tokenize, request, timeout_s)).ids)

    async def detokenize(
        self,
        ids: Sequence[int],
        continuation: bool = False,
        *,
        model: str | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> str:
        """The text of token ids; as a `continuation` of other text it keeps a leading space. Raises StatusError."""
        request = wire.detokenize_request(ids, model, continuation)
        text: str = (await self._ask(self._connect().asking.Detokenize, request, timeout_s)).text
        return text

    async def models(self, *, timeout_s: float = ASK_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the server offers. Raises StatusError."""
        request = serving_pb2.ListModelsRequest()
        return wire.models(await self._ask(self._connect().asking.ListModels, request, timeout_s))

    async def health(self, service: str = "", *, timeout_s: float = ASK_TIMEOUT_S) -> HealthStatus:
        """Whether a server serves at all, or a model does: `tramontane.v1.Serving/MODEL`. Raises StatusError."""
        request = health_pb2.HealthCheckRequest(service=service)
        return wire.health_status(await self._ask(self._connect().health.Check, request, timeout_s))

    async def stats(self, *, timeout_s: float = ASK_TIMEOUT_S) -> Stats:
        """Counters of all processes of the service. Raises StatusError."""
        request = serving_pb2.GetStatsRequest()
        return wire.stats(await self._ask(self._connect().asking.GetStats, request, timeout_s))

    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float
    ) -> _Response:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    def _connect(self) -> _Connections:
        # Only here, inside a running loop: channels of grpc.aio bind to the loop that they are made in.
        if self._connections is None:
            self._connections = _Connections(self.target, self.options, self._credentials)
        return self._connections


class _Connections:
    """The channels of one client and the stubs on them."""

    def __init__(self, target: str, options: ClientOptions, credentials: grpc.ChannelCredentials | None) -> None:
        def channel(*, watch_health: bool) -> grpc.aio.Channel:
            arguments = options.arguments(target, watch_health=watch_health)
            if credentials is None:
                return grpc.aio.insecure_channel(target, arguments)
            return grpc.aio.secure_channel(target, credentials, arguments)

        generating = [channel(watch_health=True) for _ in range(options.connections)]
        asking = channel(watch_health=False)
        self._channels = [*generating, asking]
        self.generating = itertools.cycle([_serving(each) for each in generating])
        self.asking = _serving(asking)
        self.health = health_pb2_grpc.HealthStub(asking)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)


def _serving(channel: grpc.aio.Channel) -> serving_pb2_grpc.ServingStub:
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
