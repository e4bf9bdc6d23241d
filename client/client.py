"""The blocking client. `aio.py` is the same on asyncio; what they share is in `wire`, `transcript` and `channel`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc
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
_Start: TypeAlias = "Callable[[float], grpc.CallIterator[serving_pb2.GenerateEvent]]"


class Stream(TranscriptView):
    """The deltas of one request, as they come. Leaving its block, or `close`, cancels the request on the server.

    A context manager and an iterator. `TranscriptView` says what else can be read from it, and when.
    """

    def __init__(self, start: _Start, transcript: Transcript, timeout_s: float, *, retry_refused: bool) -> None:
        """`start` makes a call that may take so many seconds."""
        super().__init__(transcript)
        self._start = start
        self._deadline_s = time.monotonic() + timeout_s
        self._retry_refused = retry_refused
        self._closed = threading.Event()
        self._call = start(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            StatusError: the call ended with an error; its class says which.
            ProtocolError: the server's events contradict each other; the call is cancelled.
        """
        while True:
            try:
                for event in self._call:
                    delta = self._transcript.feed(event)
                    if delta is not None:
                        return delta
                self._transcript.close()
            except grpc.RpcError as error:
                self._wait_to_retry(from_rpc_error(error, request_id=self.request_id))
            except BaseException:
                self.close()
                raise
            else:
                raise StopIteration

    def close(self) -> None:
        """Cancel the request; nothing happens once it has ended. May be called from another thread."""
        self._closed.set()
        self._call.cancel()  # type: ignore[no-untyped-call]

    def _wait_to_retry(self, error: StatusError) -> None:
        """Start another call when the server will have room; raises the error where there is no other try."""
        left_s = self._deadline_s - time.monotonic()
        delay_s = retry_after_s(error, begun=self._transcript.begun, left_s=left_s) if self._retry_refused else None
        if delay_s is None:
            raise error from None
        if self._closed.wait(delay_s):
            raise Cancelled("the stream was closed", request_id=self.request_id) from None
        self._call = self._start(self._deadline_s - time.monotonic())
        if self._closed.is_set():  # meanwhile, by another thread
            self._call.cancel()  # type: ignore[no-untyped-call]


class Client:
    """Talks to Tramontane servers; usable from many threads at once.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("To be, or not to be", max_tokens=32).text)

    `target` is one address (`host:port`), several (`ipv4:10.0.0.1:50051,10.0.0.2:50051`) or a name that stands for
    several (`dns:///tramontane.example:50051`); requests go round among those that serve. Nothing is connected before
    the first call.

    Every call has a deadline, `timeout_s`. `generate` and `stream` wait under it for a server that serves, so a client
    may start before its server; the other calls fail with `Unavailable` at once where no server answers.

    Raises:
        ValueError: an option is out of range, or a token would travel in clear.
    """

    def __init__(self, target: str, options: ClientOptions | None = None) -> None:
        self.target = target
        self.options = options or ClientOptions()
        self.options.check_target(target)
        self._metadata = self.options.metadata()
        credentials = self.options.tls.credentials() if self.options.tls else None

        def channel(*, watch_health: bool) -> grpc.Channel:
            arguments = self.options.arguments(target, watch_health=watch_health)
            if credentials is None:
                return grpc.insecure_channel(target, arguments)
            return grpc.secure_channel(target, credentials, arguments)

        generating = [channel(watch_health=True) for _ in range(self.options.connections)]
        asking = channel(watch_health=False)
        self._channels = [*generating, asking]
        # next() on a cycle is one step under the interpreter's lock, so that threads may share it.
        self._generating = itertools.cycle([_serving(each) for each in generating])
        self._asking = _serving(asking)
        self._health = health_pb2_grpc.HealthStub(asking)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close all connections."""
        for channel in self._channels:
            channel.close()

    def stream(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Stream:
        """Start generating; iterate over the result for its deltas. `GenerateArguments` has the keyword arguments.

        Raises:
            TypeError, ValueError: something cannot be sent (`wire.generate_request`); no call is made.
        """
        request = wire.generate_request(prompt, **arguments)

        def start(timeout_s: float) -> grpc.CallIterator[serving_pb2.GenerateEvent]:
            call: grpc.CallIterator[serving_pb2.GenerateEvent] = next(self._generating).GenerateStream(
                request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=self.options.wait
            )
            return call

        return Stream(start, Transcript(request), timeout_s, retry_refused=self.options.retry_refused)

    def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Completion:
        """Generate a whole completion: all of `stream`, collected. Raises what a `Stream` does."""
        with self.stream(prompt, timeout_s=timeout_s, **arguments) as stream:
            for _ in stream:
                pass
            return stream.completion

    def tokenize(
        self, text: str, *, add_bos: bool = True, model: str | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> tuple[int, ...]:
        """The model's token ids of a text, as a prompt's; without the BOS on demand. Raises StatusError."""
        request = wire.tokenize_request(text, model, add_bos)
        return tuple(self._ask(self._asking.Tokenize, request, timeout_s).ids)

    def detokenize(
        self,
        ids: Sequence[int],
        continuation: bool = False,
        *,
        model: str | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> str:
        """The text of token ids; as a `continuation` of other text it keeps a leading space. Raises StatusError."""
        request = wire.detokenize_request(ids, model, continuation)
        text: str = self._ask(self._asking.Detokenize, request, timeout_s).text
        return text

    def models(self, *, timeout_s: float = ASK_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the server offers. Raises StatusError."""
        return wire.models(self._ask(self._asking.ListModels, serving_pb2.ListModelsRequest(), timeout_s))

    def health(self, service: str = "", *, timeout_s: float = ASK_TIMEOUT_S) -> HealthStatus:
        """Whether a server serves at all, or a model does: `tramontane.v1.Serving/MODEL`. Raises StatusError."""
        request = health_pb2.HealthCheckRequest(service=service)
        return wire.health_status(self._ask(self._health.Check, request, timeout_s))

    def stats(self, *, timeout_s: float = ASK_TIMEOUT_S) -> Stats:
        """Counters of all processes of the service. Raises StatusError."""
        return wire.stats(self._ask(self._asking.GetStats, serving_pb2.GetStatsRequest(), timeout_s))

    def _ask(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float
    ) -> _Response:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def _serving(channel: grpc.Channel) -> serving_pb2_grpc.ServingStub:
    return serving_pb2_grpc.ServingStub(channel)  # type: ignore[no-untyped-call]
