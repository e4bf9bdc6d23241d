"""What every call passes on its way in: its size, its parsing, and the turning of exceptions into statuses."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from tramontane.cluster.errors import CallError
from tramontane.cluster.log_lines import quoted, refusals
from tramontane.cluster.stats import GatewayCounters

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class RequestGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Parses requests itself, since grpc tells a client whose bytes are no message UNKNOWN and a Python class's name.

    An exception that is no `CallError` is a mistake of ours: it is logged, and the client hears INTERNAL.
    """

    def __init__(self, request_limit_bytes: int, gateway: str) -> None:
        self._limit = request_limit_bytes
        self.counters = GatewayCounters(name=gateway)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handlers of calls with one request; reflection's streams of requests stay as they are."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # type: ignore[no-any-return]
        method = handler_call_details.method
        answer = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def behaviour(body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            arrived_s = time.monotonic()
            try:
                return await answer(self._parse(body, handler.request_deserializer), context)
            except CallError as error:
                if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    self.counters = self.counters.refused(time.monotonic() - arrived_s)
                status = error.status()
                await context.abort(
                    status.code, status.details, trailing_metadata=(*status.trailing_metadata, *error.retry_pushback)
                )
            except grpc.aio.AbortError:
                raise
            except Exception:
                refusals.exception("%s failed", quoted(method))
                await context.abort(grpc.StatusCode.INTERNAL, "a mistake of the server's own; its log says more")

        wrap = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return wrap(behaviour, request_deserializer=None, response_serializer=handler.response_serializer)

    def _parse(self, body: bytes, deserialize: Callable[[bytes], Any]) -> Any:
        if len(body) > self._limit:
            raise CallError(
                grpc.StatusCode.INVALID_ARGUMENT, f"a request may be {self._limit} bytes; this one is {len(body)}"
            )
        try:
            return deserialize(body)
        except DecodeError:
            raise CallError(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request's {len(body)} bytes are no message of its type"
            ) from None
