"""How a user talks to Tramontane: a blocking and an asyncio client with typed results and errors.

>>> from tramontane.client import Client
>>> with Client("127.0.0.1:50051") as client:                                           # doctest: +SKIP
...     with client.stream("To be, or not to be", max_tokens=32) as stream:
...         for delta in stream:
...             print(delta.text, end="", flush=True)
"""

from tramontane.client.aio import AsyncClient, AsyncStream
from tramontane.client.arguments import GenerateArguments
from tramontane.client.channel import ClientOptions, Tls
from tramontane.client.client import Client, Stream
from tramontane.client.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ProtocolError,
    ResourceExhausted,
    StatusError,
    TramontaneError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownStatus,
)
from tramontane.client.types import (
    AdmissionStats,
    Completion,
    Delta,
    FinishReason,
    GatewayStats,
    HealthStatus,
    ModelInfo,
    ProcessStats,
    RouterStats,
    StageStats,
    Stats,
    Timings,
    Usage,
)

__all__ = [
    "Aborted",
    "AdmissionStats",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "ClientOptions",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "GatewayStats",
    "GenerateArguments",
    "HealthStatus",
    "Internal",
    "InvalidArgument",
    "ModelInfo",
    "NotFound",
    "PermissionDenied",
    "ProcessStats",
    "ProtocolError",
    "ResourceExhausted",
    "RouterStats",
    "StageStats",
    "Stats",
    "StatusError",
    "Stream",
    "Timings",
    "Tls",
    "TramontaneError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownStatus",
    "Usage",
]
