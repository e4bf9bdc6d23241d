"""The standard health service over a gateway's state.

The library's own servicer changes its state in a coroutine; this one shows a change within the same turn of the event
loop, since a pipeline that breaks must turn health at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

NAME_LIMIT = 512
"""Characters of a service's name that a question may hold."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the base is untyped
    """Answers from `read`, which says for each service whether it serves; `changed` tells those who watch."""

    def __init__(self, read: Callable[[], Mapping[str, bool]]) -> None:
        self._read = read
        self._discreet = False
        self._news = asyncio.Event()
        self._closed = False

    def be_discreet(self) -> None:
        """Health needs no token. Where other calls do, keep models' names from those who do not know them."""
        self._discreet = True

    def close(self) -> None:
        """Let those who watch go, after a last answer."""
        self._closed = True
        self.changed()

    def changed(self) -> None:
        """Wake all who watch."""
        self._news.set()
        self._news = asyncio.Event()

    async def Check(  # noqa: N802  (gRPC's name)
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """One answer; NOT_FOUND for a service that is not known."""
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            known = ", ".join(map(repr, self._told()))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service is not known; known are {known}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: Context
    ) -> health_pb2.HealthListResponse:
        """All services that may be told."""
        statuses = {service: health_pb2.HealthCheckResponse(status=self._status(service)) for service in self._told()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        """An answer now and at each change; SERVICE_UNKNOWN is one."""
        if len(request.service) > NAME_LIMIT:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"service may be {NAME_LIMIT} characters; it is {len(request.service)}",
            )
        told: int | None = None
        while True:
            news = self._news
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._closed:
                return
            else:
                await news.wait()

    def _told(self) -> list[str]:
        return [service for service in self._read() if not (self._discreet and "/" in service)]

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        serving = self._read().get(service)
        if serving is None:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
