"""Bearer tokens: the file that holds them, and the interceptor that asks every call for one.

The file has one token a line; blank lines and lines that begin with `#` count for nothing. It may be changed while the
service runs. Only digests of the tokens are kept, and neither is ever logged.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from tramontane.cluster.log_lines import quoted, refusals
from tramontane.cluster.reloading import Reloading, read_bytes
from tramontane.cluster.validation import name_of_call

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Digests: TypeAlias = frozenset[bytes]

SHORTEST, LONGEST = 16, 512
"""Characters of a token. `openssl rand -hex 32` makes one of 64."""
MOST_TOKENS = 1000
OPEN = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
"""Health needs no token: load balancers ask it, and so does gRPC in a client, which sends none there."""


class Tokens:
    """The tokens of a file as it is now.

    Raises:
        ValueError: see `read_tokens`.
    """

    def __init__(self, path: str) -> None:
        self._digests = Reloading("tokens", [path], lambda: read_tokens(path))

    def know(self, token: str) -> bool:
        """Whether the file has the token. How long this takes tells something of digests at most, never of tokens."""
        return _digest(token.encode()) in self._digests.value()


def read_tokens(path: str) -> Digests:
    """The digests of the tokens in a file.

    Raises:
        ValueError: the file cannot be read, holds no token, too many, or a line that is none; names the line only.
    """
    limit = MOST_TOKENS * (LONGEST + 2)
    lines = enumerate(read_bytes("--token-file", path, limit).splitlines(), 1)
    tokens = {number: line.strip() for number, line in lines if line.strip() and not line.strip().startswith(b"#")}
    for number, token in tokens.items():
        if not re.fullmatch(rb"[!-~]+", token):
            raise ValueError(f"--token-file is {path}: line {number} is not printable ASCII without spaces")
        if not SHORTEST <= len(token) <= LONGEST:
            raise ValueError(
                f"--token-file is {path}: a token has {SHORTEST} to {LONGEST} characters, and line {number} has "
                f"{len(token)}; `openssl rand -hex 32` makes one"
            )
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise ValueError(f"--token-file is {path}: it holds {len(tokens)} tokens, of 1 to {MOST_TOKENS}")
    return frozenset(_digest(token) for token in tokens.values())


class TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses calls without a known token before their request is read. Reflection needs one too."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Let it through, or put a handler in its place that refuses."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        if not needs_token(method):
            return await continuation(handler_call_details)
        reason = self._reason(dict(metadata or ()).get("authorization"))
        if reason is None:
            return await continuation(handler_call_details)

        async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            name = name_of_call(metadata)
            said = f"{reason}, request {quoted(name)}" if name else reason
            refusals.info("%s from %s: UNAUTHENTICATED, %s", quoted(method), quoted(context.peer()), said)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

        # A stream on both sides fits every call: its requests are left unread.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _reason(self, authorization: str | bytes | None) -> str | None:
        """Why a call with this metadata is refused; None where it is not."""
        if authorization is None:
            return "a bearer token is missing: this server needs the metadata `authorization: Bearer TOKEN`"
        token = bearer_token(str(authorization))
        if token is None:
            return "the metadata `authorization` holds no bearer token: it should say `Bearer TOKEN`"
        return None if self._tokens.know(token) else "the bearer token is not known here"


def needs_token(method: str) -> bool:
    """Whether a call of this method needs a token where tokens are asked for."""
    return not method.startswith(OPEN)


def bearer_token(authorization: str) -> str | None:
    """The token in the metadata `authorization`; None where it holds none.

    >>> bearer_token("bearer  sesame")
    'sesame'
    """
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
