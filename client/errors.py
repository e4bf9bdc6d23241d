"""Everything that the client raises about a call, one class for each status.

    TramontaneError
    ├── ProtocolError              the server broke the stream's contract (a gap between offsets, no last event, ...)
    └── StatusError                the call ended with a gRPC status, from the server or from gRPC on its behalf
        ├── Aborted                ABORTED              begun on a version of the model that is served no longer
        ├── Cancelled              CANCELLED            the stream was closed, or the server ended it
        ├── DeadlineExceeded       DEADLINE_EXCEEDED    `timeout_s` is over
        ├── FailedPrecondition     FAILED_PRECONDITION  for example text for a model without a tokenizer
        ├── Internal               INTERNAL             a fault of the server
        ├── InvalidArgument        INVALID_ARGUMENT     `violations` says which fields and why
        ├── NotFound               NOT_FOUND            no such model or health service
        ├── PermissionDenied       PERMISSION_DENIED    the token does not allow it
        ├── ResourceExhausted      RESOURCE_EXHAUSTED   the queue is full, or a message is too large
        ├── Unauthenticated        UNAUTHENTICATED      a token is missing or not known
        ├── Unavailable            UNAVAILABLE          not reached, loading, draining, or broken on the way
        ├── Unimplemented          UNIMPLEMENTED        the server knows no such call
        └── UnknownStatus          any other status

Values that cannot be sent at all (a negative seed, a prompt that is no text) raise `ValueError` or `TypeError` before
a call starts.
"""

# ruff: noqa: N818  (the classes are named like the statuses)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, RequestInfo, RetryInfo
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One field of a request that the server refuses."""

    field: str
    description: str


class TramontaneError(Exception):
    """The root of everything that a call can raise.

    `message` is one sentence or two for a person. `request_id` is the request's name in the server's log; empty for
    calls that have none.
    """

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class ProtocolError(TramontaneError):
    """The server's events contradict each other or the request; what was received so far cannot be trusted."""


class StatusError(TramontaneError):
    """The call ended with a status other than OK. Raised as the subclass of that status.

    `retry_after_s` is how long the server asks to wait before another try, None where it does not say. `violations`
    names the refused fields.
    """

    code: ClassVar[grpc.StatusCode]

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        retry_after_s: float | None = None,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s
        self.violations = violations


class Aborted(StatusError):
    """The request began on a version of the model that is served no longer."""

    code = grpc.StatusCode.ABORTED


class Cancelled(StatusError):
    """The stream was closed, or the server ended it."""

    code = grpc.StatusCode.CANCELLED


class DeadlineExceeded(StatusError):
    """`timeout_s` is over; the message says what was waited for."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class FailedPrecondition(StatusError):
    """The server cannot do this as it is set up."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Internal(StatusError):
    """A fault of the server."""

    code = grpc.StatusCode.INTERNAL


class InvalidArgument(StatusError):
    """The request is wrong; `violations` says where."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(StatusError):
    """No such model or health service."""

    code = grpc.StatusCode.NOT_FOUND


class PermissionDenied(StatusError):
    """The token does not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(StatusError):
    """The server's queue is full (`retry_after_s` may say when to come back), or a message is too large."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(StatusError):
    """A bearer token is missing or not known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Unavailable(StatusError):
    """The server cannot be reached, is loading or draining, or broke on the way."""

    code = grpc.StatusCode.UNAVAILABLE


class Unimplemented(StatusError):
    """The server knows no such call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class UnknownStatus(StatusError):
    """A status that Tramontane's servers do not use; the message begins with its name."""

    code = grpc.StatusCode.UNKNOWN


_CLASS_OF_STATUS = {
    error_class.code: error_class for error_class in StatusError.__subclasses__() if error_class is not UnknownStatus
}


def from_rpc_error(error: grpc.RpcError, *, request_id: str = "") -> StatusError:
    """The exception for the error of a call, sync or asyncio, with the details that came with it.

    `request_id` is the client's own name for the request; the server's RequestInfo goes before it.
    """
    # Calls of grpc.aio answer the same questions without being a grpc.Call.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), f"an error of a call carries its status: {error!r}"
    code = error.code()
    message = error.details() or code.name
    try:
        details = _details(error)
    except (ValueError, DecodeError):
        details = _Details()  # damaged or contradicting; the status itself still stands
    error_class = _CLASS_OF_STATUS.get(code, UnknownStatus)
    return error_class(
        f"{code.name}: {message}" if error_class is UnknownStatus else message,
        request_id=details.request_id or request_id,
        retry_after_s=details.retry_after_s,
        violations=details.violations,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Details:
    request_id: str = ""
    retry_after_s: float | None = None
    violations: tuple[FieldViolation, ...] = ()


def _details(call: grpc.Call | grpc.aio.AioRpcError) -> _Details:
    """What we know of the call's `google.rpc.Status`. Raises ValueError or DecodeError where it is damaged."""
    status = rpc_status.from_call(call)  # type: ignore[arg-type]
    request_info, retry_info, bad_request = RequestInfo(), RetryInfo(), BadRequest()
    retry_after_s: float | None = None
    for packed in status.details if status else ():
        packed.Unpack(request_info)
        packed.Unpack(bad_request)
        if packed.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToTimedelta().total_seconds()
    return _Details(
        request_id=request_info.request_id,
        retry_after_s=retry_after_s,
        violations=tuple(
            FieldViolation(field=violation.field, description=violation.description)
            for violation in bad_request.field_violations
        ),
    )
