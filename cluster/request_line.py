"""The line that a gateway's log has of each request once it is over: who, how much, how it ended, how long; no text."""

from __future__ import annotations

import logging

from tramontane.cluster.completion import Completion
from tramontane.cluster.log_lines import quoted, refusals

log = logging.getLogger(__name__)


class RequestLine:
    """Gathers what there is to say of one request. Times are the event loop's, in seconds."""

    def __init__(self, request_id: str, arrived_s: float) -> None:
        self._request_id = quoted(request_id)
        self._arrived_s = arrived_s
        self._completion: Completion | None = None
        self._pipeline = ""

    def sent_to(self, pipeline: str, completion: Completion) -> None:
        """A pipeline works for it, and this is what comes of it."""
        self._pipeline = pipeline
        self._completion = completion

    def write(self, status: str, now_s: float) -> None:
        """It is over. Where a request has ended without a token, only so many a second are written.

        request 5f0c: OK, LENGTH, 12 prompt and 64 completion tokens, queue 0.4 ms, prefill 8.1 ms, decode 97.5 ms,
        all 106.9 ms, router-0
        """
        parts, completion = [f"request {self._request_id}: {status}"], self._completion
        if completion is not None:
            timings = completion.timings
            parts += [
                f"{completion.prompt_tokens} prompt and {completion.tokens} completion tokens",
                f"queue {timings.queue_ms:.1f} ms",
                f"prefill {timings.prefill_ms:.1f} ms",
                f"decode {timings.decode_ms:.1f} ms",
            ]
        parts.append(f"all {(now_s - self._arrived_s) * 1e3:.1f} ms")
        if self._pipeline:
            parts.append(self._pipeline)
        worked = completion is not None and completion.tokens > 0
        (log if worked else refusals).info("%s", ", ".join(parts))
