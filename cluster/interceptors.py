"""What every call passes on its way in: its user's share, its request's reading, and how exceptions become statuses."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from tramontane.cluster.errors import RETRY_AFTER_S, CallError, without_frames
from tramontane.cluster.fairness import Shares
from tramontane.cluster.log_lines import quoted, refusals
from tramontane.cluster.places import Places
from tramontane.cluster.request_size import SizeError, check_size, request_limit_bytes
from tramontane.cluster.stats import REFUSAL_BOUNDS_S
from tramontane.cluster.tokens import needs_token
from tramontane.cluster.users import Users, host_of
from tramontane.cluster.validation import name_of_call

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

OPEN_CALLS = 8192
"""Calls of all users that may be open together. One user alone may have half of them."""
RECEIVING_BYTES = 128 << 20
"""Memory for requests that are being read; it decides how many may be read at a time."""
FEWEST_PLACES = 16
"""So many requests may be read at a time, however large they may be."""
LEAST_RECEIVED_BYTES = 8 << 20
"""A request of this size is read to its end, even where the context allows much less."""
RECEIVE_S = 30.0
"""A request must have come whole so long after its reading began."""


def receive_limit_bytes(request_limit_bytes: int) -> int:
    """The size up to which gRPC lets requests in, above the limit: then the refusal is ours and has numbers."""
    return max(LEAST_RECEIVED_BYTES, 2 * request_limit_bytes)


class RequestGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses calls beyond a user's share at once, reads requests itself, and ends calls with typed statuses.

    - gRPC would read all requests side by side and keep what has come of each. The guard reads as many at a time as fit
      into memory; of the others no more comes in than a stream's first window.
    - gRPC would tell a client whose bytes are no message UNKNOWN and a Python class's name; the guard parses.
    - An exception that is no `CallError` is a mistake of ours: it is logged, and the client hears INTERNAL.
    """

    def __init__(self, context: int, users: Users) -> None:
        self._context = context
        self._users = users
        self._calls = Shares(OPEN_CALLS)
        largest = receive_limit_bytes(request_limit_bytes(context))
        self._receiving = Places(max(FEWEST_PLACES, RECEIVING_BYTES // largest))
        self.refusal_counts = [0] * len(REFUSAL_BOUNDS_S)
        """Calls that ended with RESOURCE_EXHAUSTED, by the time that it took; see `GatewayCounters`."""
        self.refused = 0
        """Calls beyond a user's share, since the start."""

    @property
    def open(self) -> int:
        """Calls that are open now."""
        return self._calls.total - self._calls.left

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handlers of all calls."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # type: ignore[return-value]  # no such method, says gRPC then
        method = handler_call_details.method
        checked = needs_token(method)

        async def behaviour(messages: Any, context: Context) -> Any:
            arrived_s = time.monotonic()
            # A token makes a user only where it has been checked.
            user = self._users.of(context) if checked else host_of(context.peer())
            answer = await self._answer(method, handler, user, messages, context)
            if isinstance(answer, CallError):
                answer.request_id = answer.request_id or name_of_call(context.invocation_metadata())
                # No exception is being handled here, so none is kept with the abort's.
                if answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    self.refusal_counts[bisect_left(REFUSAL_BOUNDS_S, time.monotonic() - arrived_s)] += 1
                status = answer.status()
                await context.abort(
                    status.code, status.details, trailing_metadata=(*status.trailing_metadata, *answer.retry_pushback)
                )
            return answer

        # Declared as taking a stream of requests, even where there is one: then gRPC leaves the reading to us.
        deserialize = handler.request_deserializer if handler.request_streaming else None
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return wrap(behaviour, deserialize, handler.response_serializer)

    async def _answer(self, method: str, handler: Any, user: str, messages: Any, context: Context) -> Any:
        """What the handler answers, or how the call fails."""
        if not self._calls.take(user):
            self.refused += 1
            return CallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._calls.held_by(user)} calls of yours are open, and {self._calls.left} of all "
                f"{self._calls.total} places are left; nobody gets more than are left",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            if handler.request_streaming:
                return await self._converse(handler, user, messages, context)
            answer = handler.unary_stream if handler.response_streaming else handler.unary_unary
            return await answer(await self._receive(method, handler, user, context), context)
        except CallError as error:
            return without_frames(error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            name = name_of_call(context.invocation_metadata())
            refusals.exception("%s failed%s", quoted(method), f", request {quoted(name)}" if name else "")
            return CallError(grpc.StatusCode.INTERNAL, "a mistake of the server's own; its log says more")
        finally:
            self._calls.give_back(user)

    async def _receive(self, method: str, handler: Any, user: str, context: Context) -> Any:
        """The call's request."""
        await self._receiving.take(user)
        try:
            async with asyncio.timeout(RECEIVE_S):
                body = await context.read()
        except TimeoutError:
            raise CallError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the request has not come whole within {RECEIVE_S:g} s"
            ) from None
        finally:
            self._receiving.leave(user)
        if body is EOF:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "the call brought no request")
        return self._parse(method, body, handler.request_deserializer)

    async def _converse(self, handler: Any, user: str, requests: Any, context: Context) -> None:
        """A stream of requests, reflection's: one may be on its way at any time, so the place is kept to the end."""
        if not self._receiving.take_at_once(user):
            self.refused += 1
            raise CallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are being read", retry_after_s=RETRY_AFTER_S
            )
        try:
            async with aclosing(handler.stream_stream(requests, context)) as answers:
                async for answer in answers:
                    await context.write(answer)
        finally:
            self._receiving.leave(user)

    def _parse(self, method: str, body: bytes, deserialize: Callable[[bytes], Any]) -> Any:
        try:
            check_size(method, body, self._context)
        except SizeError as error:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, str(error), field=error.field) from None
        try:
            return deserialize(body)
        except DecodeError:
            raise CallError(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request's {len(body)} bytes are no message of its type"
            ) from None
