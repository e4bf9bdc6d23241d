"""What became of one request, as its worker saw it. Times are seconds from the run's start, by the monotonic clock that
all processes of a machine share.

A completion of three tokens that was due at 2.000 s, sent 1 ms late, and came in two messages:

    intended_s=2.000 sent_s=2.001 message_times_s=(2.101, 2.151) message_tokens=(1, 2) ended_s=2.152 status="OK"
    TTFT 101 ms; one ITL of 50 ms, as ITL per token two of 25 ms; TPOT (2.152 - 2.101) / 2 = 25.5 ms; end to end 152 ms
"""

from __future__ import annotations

from dataclasses import dataclass

from tramontane.client.loadtest.plan import Conduct

OK = "OK"
CUT = "CUT"
"""Still running when the run stopped waiting for it."""
LEFT = "LEFT"
"""Left by its client, as its conduct asks."""
PROTOCOL = "PROTOCOL"
"""The stream contradicted itself: a gap between offsets, no last event, another request's id. A wrong answer."""
STREAM_ERROR = "STREAM_ERROR"
"""The server said inside its stream that the request failed, and named no HTTP status for it."""
INCOMPLETE = "INCOMPLETE"
"""The stream ended before the answer did."""
UNREADABLE = "UNREADABLE"
"""What came could not be decoded, so nobody knows what it was."""
REFUSED = frozenset({"RESOURCE_EXHAUSTED", "HTTP_429"})
"""How servers turn a request away that they have no room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTimings:
    """Where the server says that its time went."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request's outcome."""

    number: int
    """Of its ask."""
    intended_s: float
    """When the schedule wanted it to arrive; of a closed loop, when its user was ready."""
    sent_s: float
    """When it was handed to the connection."""
    message_times_s: tuple[float, ...]
    """When each message that brought tokens (HTTP: content) was read."""
    message_tokens: tuple[int, ...]
    """Tokens in each of them. HTTP does not say: then 1 each, and `completion_tokens` is the server's count."""
    ended_s: float
    """When the end was known: the last event, the error, or the cut."""
    status: str
    """OK, a gRPC status's name, HTTP_404 and its like, or one of the names above."""
    error: str = ""
    """The message that came with it."""
    conduct: Conduct = Conduct.NORMAL
    prompt_tokens: int = 0
    """0 where the server did not say."""
    completion_tokens: int = 0
    """As counted by the client; over HTTP by the server's usage, and 0 where it sends none."""
    finish_reason: str = ""
    server: ServerTimings | None = None
    token_ids: tuple[int, ...] = ()
    """Empty over HTTP."""
    text: str = ""

    @property
    def ok(self) -> bool:
        """It was answered in full."""
        return self.status == OK

    @property
    def failed(self) -> bool:
        """It was refused, or broke off. One that the run cut or its client left did not; a BAD one is meant to."""
        return self.status not in (OK, LEFT, CUT) and self.conduct is not Conduct.BAD

    @property
    def refused(self) -> bool:
        """It failed because the server had no room for it."""
        return self.failed and self.status in REFUSED
