"""Whom a worker sends requests to: one small interface, and the choice between our gRPC and OpenAI-compatible HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from tramontane.client.loadtest.plan import Ask
from tramontane.client.loadtest.record import ServerTimings
from tramontane.client.loadtest.result import TargetInfo
from tramontane.client.types import Stats

OPTIONAL = ("seed", "stream_options", "ignore_eos")
"""Fields of an HTTP request that decide or tell more, and that some servers refuse."""

OnTokens: TypeAlias = Callable[[int], Awaitable[None]]
"""Called as soon as a message that brings tokens is read, with how many. May wait (a slow reader) or raise `Leave`."""


class Leave(Exception):  # noqa: N818  (not an error)
    """The client has seen enough: close the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request brought, apart from its times."""

    status: str
    """OK, or the status's name as in `Record`."""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    server: ServerTimings | None = None
    token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """How to reach the server; the same for all workers. Holds no secret, only where it is kept."""

    address: str
    """HOST:PORT and its like for gRPC; http://HOST:PORT/v1 for an OpenAI-compatible server."""
    model: str | None = None
    connections: int = 1
    timeout_s: float = 300.0
    """Deadline of each request."""
    tls: bool = False
    ca: str | None = None
    """Path of a PEM file: the authorities to trust."""
    cert: str | None = None
    """Path of a PEM file: the client's certificate."""
    key: str | None = None
    """Path of a PEM file: its private key."""
    server_name: str | None = None
    """The name that the server's certificate must carry, where it is not the target's."""
    token_file: str | None = None
    """Holds a bearer token (HTTP: the API key)."""
    clear_token: bool = False
    """Let the token travel beyond this machine without TLS."""
    chat: bool = False
    """HTTP: use /chat/completions instead of /completions."""
    send: tuple[str, ...] = ()
    """HTTP: those of OPTIONAL that are sent even to a server that is not known to take them."""

    @property
    def is_http(self) -> bool:
        """An OpenAI-compatible server."""
        return is_http(self.address)

    @property
    def encrypts(self) -> bool:
        """Any option of encryption asks for it."""
        return bool(self.tls or self.ca or self.cert or self.key or self.server_name)

    def read_token(self) -> str | None:
        """The token that the file holds. Raises OSError."""
        return Path(self.token_file).read_text().strip() if self.token_file else None


def is_http(address: str) -> bool:
    """Whether an OpenAI-compatible server is meant; every other address is gRPC's, `http-gateway:50051` too."""
    return address.startswith(("http://", "https://"))


class Target(Protocol):
    """A connected server. Belongs to one event loop."""

    async def describe(self) -> TargetInfo:
        """Which model it serves.

        Raises:
            ConnectionError: it does not answer, or does not serve the model.
        """

    async def send(self, ask: Ask, on_tokens: OnTokens) -> Answer:
        """Send one request and read it to its end. Every outcome is an answer; only cancellation raises."""

    async def count_tokens(self, text: str) -> int | None:
        """How many tokens a prompt of this text has, its BOS included; None where the server cannot say.

        Raises:
            ConnectionError: it does not answer.
        """

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | None:
        """The text that the ids print as a continuation; None where the server cannot say."""

    async def stats(self) -> Stats | None:
        """The server's counters; None where it has none to tell, or does not answer."""

    async def close(self) -> None:
        """Let all connections go."""


def open_target(options: TargetOptions) -> Target:
    """A target for this address; nothing is connected yet.

    Raises:
        ValueError: an option is not right, or a token would travel in clear.
        OSError: the token's file cannot be read.
    """
    if options.is_http:
        from tramontane.client.loadtest.generator.openai_target import OpenAITarget

        return OpenAITarget(options)
    from tramontane.client.loadtest.generator.grpc_target import GrpcTarget

    return GrpcTarget(options)
