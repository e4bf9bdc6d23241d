"""Why a call does not get through: which questions to ask, and what follows from the answers.

Nothing here waits or sends. `diagnose` yields questions; the blocking client and the asyncio one put them, each in its
way, and send the answers in.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from tramontane.client.channel import Tls
from tramontane.client.errors import DeadlineExceeded, PermissionDenied, StatusError, Unauthenticated, Unavailable
from tramontane.client.failures import Kind, read_failure
from tramontane.client.tls_look import Seen

QUESTION_S = 2.0
"""How long an answer may take."""


class Ask(Enum):
    """Questions that are put to a server by calls that do not wait. The answer is a response, or a StatusError."""

    HEALTH = "health"
    """`Health.Check`, by the channel that the call in question uses: so a channel's failure is that call's."""
    MODELS = "models"
    """`ListModels`, by the channel that asks any server, serving or not."""


@dataclass(frozen=True, slots=True)
class Look:
    """Shake hands with this address (`tls_look.look`). The answer is what was seen."""

    address: str


Questions: TypeAlias = "Generator[Ask | Look, Any, News]"


class Standing(Enum):
    """How things stand between client and server."""

    SERVING = "serving"
    """A server takes calls, whatever it answers."""
    AWAITED = "awaited"
    """A server answers, and does not serve."""
    UNREACHED = "unreached"
    """No server answers, and one may yet."""
    HOPELESS = "hopeless"
    """It will not change while client and server are set up as they are."""
    UNKNOWN = "unknown"
    """No answer came in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a diagnosis has found."""

    standing: Standing
    reason: str = ""
    """A sentence; empty while a server serves or nothing is known."""
    error_class: type[StatusError] = Unavailable

    def error(self, request_id: str) -> StatusError:
        """For a call that ends because of it."""
        return self.error_class(self.reason, request_id=request_id)


SERVING = News(standing=Standing.SERVING)
UNKNOWN = News(standing=Standing.UNKNOWN)


def diagnose(target: str, tls: Tls | None, failure: StatusError | None = None) -> Questions:
    """Find out why calls do not get through, `failure` of one of them being known or not.

    There is no reason in the news where a server has given the failure by itself.
    """
    known = failure is not None
    if failure is None:
        answer = yield Ask.HEALTH
        if not isinstance(answer, StatusError):
            return SERVING
        failure = answer
    if isinstance(failure, DeadlineExceeded):
        return UNKNOWN
    found = read_failure(failure.message, target, encrypted=tls is not None)
    if found is None:
        # A server's own words.
        return _awaited(target, failure.message) if isinstance(failure, Unavailable) and not known else SERVING
    if found.kind is Kind.UNHEALTHY:
        return (yield from _why_not_serving(target, tls))
    hopeless = found.sentence if found.kind in (Kind.HOPELESS, Kind.FOREIGN) else ""
    if found.kind in (Kind.CLOSED, Kind.FOREIGN) and found.address:
        hopeless = _seen((yield Look(found.address)), target) or hopeless
    return News(
        standing=Standing.HOPELESS if hopeless else Standing.UNREACHED,
        reason=hopeless or found.sentence,
        error_class=type(failure),
    )


def _why_not_serving(target: str, tls: Tls | None) -> Questions:
    """Health has said that nothing serves; it does not say why."""
    answer = yield Ask.MODELS
    if not isinstance(answer, StatusError):
        return _awaited(target, next((info.reason for info in answer.models if info.reason), ""))
    found = read_failure(answer.message, target, encrypted=tls is not None)
    reason = answer.message if found is None else found.sentence
    if isinstance(answer, Unauthenticated | PermissionDenied):
        # It would be so when the server serves.
        return News(standing=Standing.HOPELESS, reason=reason, error_class=type(answer))
    return _awaited(target, reason if isinstance(answer, Unavailable) else "")


def _awaited(target: str, reason: str) -> News:
    return News(standing=Standing.AWAITED, reason=f"{target} does not serve{reason and f' ({reason})'}")


def _seen(seen: Seen, target: str) -> str:
    """Why nothing will come of it, after a look."""
    match seen:
        case Seen.NOTHING:
            return ""
        case Seen.SPEAKS_TLS:
            return f"{target} speaks TLS, and the client does not; give it tls (--tls, or --ca FILE)"
        case Seen.WANTS_CERTIFICATE:
            return f"{target} wants a client certificate; give cert and key (--cert, --key)"
        case Seen.REFUSES_CERTIFICATE:
            return f"{target} refuses the client's certificate; is it of an authority that the server trusts?"
