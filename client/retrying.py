"""Whether a refused request is tried again, and when. Pure: both kinds of streams ask here."""

from __future__ import annotations

from tramontane.client.errors import ResourceExhausted, StatusError


def retry_after_s(error: StatusError, *, begun: bool, left_s: float) -> float | None:
    """Seconds until the next try of a request that failed with `left_s` to its deadline; None where there is none.

    A server that is full says when it will have room. Without that word (a message that is too large, say), with the
    deadline before it, or once a first event has come, the error stands.

    >>> full = ResourceExhausted("too many requests wait", retry_after_s=2.0)
    >>> [retry_after_s(full, begun=begun, left_s=left_s) for begun, left_s in ((False, 9), (False, 1), (True, 9))]
    [2.0, None, None]
    """
    if begun or not isinstance(error, ResourceExhausted) or error.retry_after_s is None:
        return None
    return error.retry_after_s if error.retry_after_s < left_s else None
