"""gRPC's own words for the end of a call, put into ours. Pure: both clients share it."""

from __future__ import annotations

import re

from google.protobuf.message import Message

from tramontane.client import wire
from tramontane.client.errors import Cancelled, DeadlineExceeded, FieldViolation, ResourceExhausted, StatusError

_TOO_LARGE = re.compile(
    r"(?P<who>CLIENT: Sent|SERVER: Received) message larger than max \((?P<size>\d+) vs\. (?P<limit>\d+)\)"
)
CLOSED = "the client is closed"


def reword(failure: StatusError, request: Message, *, timeout_s: float, reason: str = "") -> StatusError:
    """The failure of a call in our words. `reason` is what the call is known to have waited for."""
    if isinstance(failure, DeadlineExceeded) and failure.message == "Deadline Exceeded":
        said = reason or "the answer has not come whole"
        return DeadlineExceeded(f"{timeout_s:g} s are over: {said}", request_id=failure.request_id)
    if isinstance(failure, Cancelled) and "hannel closed" in failure.message:
        return Cancelled(CLOSED, request_id=failure.request_id)
    if isinstance(failure, Cancelled) and "ancelled by application" in failure.message:
        return Cancelled("the stream was closed", request_id=failure.request_id)
    if isinstance(failure, ResourceExhausted) and (match := _TOO_LARGE.search(failure.message)):
        field = wire.largest_field(request)
        whose = "the client sends (max_message_bytes)" if match["who"].startswith("CLIENT") else "the server reads"
        sentence = f"{field} makes the request {match['size']} bytes long; {whose} at most {match['limit']}"
        violation = FieldViolation(field=field, description=sentence)
        return ResourceExhausted(sentence, request_id=failure.request_id, violations=(violation,))
    return failure
