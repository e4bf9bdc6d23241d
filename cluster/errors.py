"""How a call fails: one exception that carries a gRPC status and what its details say.

CallError        a status for the client
InvalidField     (validation.py) a ValueError that names a field; becomes INVALID_ARGUMENT
"""

from __future__ import annotations

from typing import TypeVar

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

E = TypeVar("E", bound=BaseException)

RETRY_AFTER_S = 1.0
"""What a full queue tells its clients to wait."""


class CallError(Exception):
    """Ends a call with a status whose details are `google.rpc` messages: BadRequest, RetryInfo, RequestInfo."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        retry: bool = True,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        """The request's field at fault, as a path: `sampling.top_p`."""
        self.retry_after_s = retry_after_s
        self.retry = retry
        """Whether gRPC may try again by itself before the first message."""
        self.request_id = request_id
        """The request's name, filled in by whoever knows it."""

    def status(self) -> grpc.Status:
        """The status for the wire."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.request_id is not None:
            status.details.add().Pack(error_details_pb2.RequestInfo(request_id=self.request_id))
        return rpc_status.to_status(status)

    @property
    def retry_pushback(self) -> tuple[tuple[str, str], ...]:
        """Trailers that keep gRPC from trying again by itself, where that would only hide the error from the user."""
        return () if self.retry else (("grpc-retry-pushback-ms", "-1"),)


def without_frames(error: E) -> E:
    """The exception without what led to it.

    A traceback's frames hold whatever their functions worked on, a prompt of megabytes for example; and where one of
    them holds the exception, all that stays in memory until the garbage collector comes by.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
