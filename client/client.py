"""The blocking client. `aio.py` is the same on asyncio; both share the pure modules beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tramontane.client import checked, wire
from tramontane.client.arguments import GenerateArguments, Prompt, generate_request_of, shows_generate_arguments
from tramontane.client.channel import ASK_TIMEOUT_S, GENERATE_TIMEOUT_S, ClientOptions, client_repr
from tramontane.client.connection import Connections
from tramontane.client.diagnosis import Diagnosis
from tramontane.client.errors import Cancelled, StatusError, from_rpc_error
from tramontane.client.retrying import retry_after_s
from tramontane.client.transcript import Transcript, TranscriptView
from tramontane.client.types import Completion, Delta, HealthStatus, ModelInfo, Stats
from tramontane.protos import serving_pb2


class Stream(TranscriptView):
    """The deltas of one request, as they come. Leaving its block, or `close`, cancels the request on the server.

    A context manager and an iterator. `TranscriptView` says what else can be read from it, and when.
    """

    def __init__(self, connections: Connections, request: serving_pb2.GenerateRequest, timeout_s: float) -> None:
        super().__init__(Transcript(request))
        self._connections = connections
        self._request = request
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._closed = threading.Event()
        self._given_up: Diagnosis | None = None
        self.waited_for = ""
        self._start()

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
                if self._transcript.begun:
                    delta = self._read()
                else:
                    with self._connection.waits(self):
                        delta = self._read()
            except grpc.RpcError as error:
                self._wait_to_retry(self._failure(error))
            except BaseException:
                self.close()
                raise
            else:
                if delta is None:
                    raise StopIteration
                return delta

    def close(self) -> None:
        """Cancel the request; nothing happens once it has ended. May be called from another thread."""
        self._closed.set()
        self._call.cancel()  # type: ignore[no-untyped-call]

    def give_up(self, diagnosis: Diagnosis) -> None:
        """End the call with this diagnosis's error. The call's connection calls it."""
        self._given_up = diagnosis
        self._call.cancel()  # type: ignore[no-untyped-call]

    @property
    def waiting_for(self) -> str:
        """Why nothing has come yet, a sentence. Empty once something has, and while nothing is known to be wrong."""
        return "" if self._transcript.begun else self._connection.reason

    def _start(self) -> None:
        self._connection = self._connections.next()
        self._call = self._connection.generate(self._request, self._deadline_s - time.monotonic())

    def _read(self) -> Delta | None:
        """The next delta; None at the end."""
        for event in self._call:
            delta = self._transcript.feed(event)
            if delta is not None:
                return delta
        self._transcript.close()
        return None

    def _failure(self, error: grpc.RpcError) -> StatusError:
        if self._given_up is not None:
            return self._given_up.error(self.request_id)
        failure = from_rpc_error(error, request_id=self.request_id)
        reason = "" if self._transcript.begun else self.waited_for
        return self._connections.server.explain(failure, self._request, self._timeout_s, reason)

    def _wait_to_retry(self, error: StatusError) -> None:
        """Start another call when the server will have room; raises the error where there is no other try."""
        retry = self._connections.server.options.retry_refused
        left_s = self._deadline_s - time.monotonic()
        delay_s = retry_after_s(error, begun=self._transcript.begun, left_s=left_s) if retry else None
        if delay_s is None:
            raise error from None
        if self._closed.wait(delay_s):
            raise Cancelled("the stream was closed", request_id=self.request_id) from None
        self._start()
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
    may start before its server; where none can be reached at all they fail with `Unavailable`, after 30 s or, if
    waiting cannot help, at once (`ClientOptions.reach_timeout_s`). The other calls fail with `Unavailable` at once
    where no server answers. All say why. A closed client raises RuntimeError.

    Raises:
        ValueError: an option is out of range, the target cannot be one, or a token would travel in clear.
    """

    def __init__(self, target: str, options: ClientOptions | None = None) -> None:
        self.target = target
        self.options = options or ClientOptions()
        self._connections = Connections(target, self.options)

    def __repr__(self) -> str:
        return client_repr("Client", self.target, self.options, closed=self._connections.server.closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close all connections."""
        self._connections.close()

    @shows_generate_arguments
    def stream(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Stream:
        """Start generating; iterate over the result for its deltas.

        Raises:
            TypeError, ValueError: something cannot be sent (`generate_request`); no call is made.
        """
        return self._stream("Client.stream", prompt, timeout_s, arguments)

    @shows_generate_arguments
    def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **arguments: Unpack[GenerateArguments]
    ) -> Completion:
        """Generate a whole completion: all of `stream`, collected. Raises what a `Stream` does."""
        with self._stream("Client.generate", prompt, timeout_s, arguments) as stream:
            for _ in stream:
                pass
            return stream.completion

    def tokenize(
        self, text: str, *, add_bos: bool = True, model: str | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> tuple[int, ...]:
        """The model's token ids of a text, as a prompt's; without the BOS on demand. Raises StatusError."""
        with checked.naming("Client.tokenize"):
            request, seconds = wire.tokenize_request(text, model, add_bos), checked.timeout(timeout_s)
        server = self._connections.server
        return tuple(server.ask(server.serving.Tokenize, request, seconds).ids)

    def detokenize(
        self,
        ids: Sequence[int],
        continuation: bool = False,
        *,
        model: str | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> str:
        """The text of token ids; as a `continuation` of other text it keeps a leading space. Raises StatusError."""
        with checked.naming("Client.detokenize"):
            request, seconds = wire.detokenize_request(ids, model, continuation), checked.timeout(timeout_s)
        server = self._connections.server
        text: str = server.ask(server.serving.Detokenize, request, seconds).text
        return text

    def models(self, *, timeout_s: float = ASK_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the server offers. Raises StatusError."""
        with checked.naming("Client.models"):
            seconds = checked.timeout(timeout_s)
        server = self._connections.server
        return wire.models(server.ask(server.serving.ListModels, serving_pb2.ListModelsRequest(), seconds).models)

    def health(self, service: str = "", *, timeout_s: float = ASK_TIMEOUT_S) -> HealthStatus:
        """Whether a server serves at all, or a model does: `tramontane.v1.Serving/MODEL`. Raises StatusError."""
        with checked.naming("Client.health"):
            request, seconds = wire.health_request(service), checked.timeout(timeout_s)
        server = self._connections.server
        return wire.health_status(server.ask(server.health.Check, request, seconds))

    def stats(self, *, timeout_s: float = ASK_TIMEOUT_S) -> Stats:
        """Counters of all processes of the service. Raises StatusError."""
        with checked.naming("Client.stats"):
            seconds = checked.timeout(timeout_s)
        server = self._connections.server
        return wire.stats(server.ask(server.serving.GetStats, serving_pb2.GetStatsRequest(), seconds))

    def _stream(self, method: str, prompt: Prompt, timeout_s: float, arguments: Mapping[str, Any]) -> Stream:
        with checked.naming(method):
            seconds = checked.timeout(timeout_s)
        return Stream(self._connections, generate_request_of(method, prompt, arguments), seconds)
