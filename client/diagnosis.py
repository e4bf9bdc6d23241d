"""Why a call does not get through: which questions to ask, and what follows from the answers.

Nothing here waits or sends. `diagnose` is a generator that yields questions and is sent their answers, so that the
blocking client and the asyncio client can share it.
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
    """Questions to a server, put by calls that do not wait. The answer is the response, or a StatusError."""

    HEALTH = "health"
    """`Health.Check`, on the channel of the call in question, so that the channel's failure shows."""
    MODELS = "models"
    """`ListModels`, on the channel that also reaches servers that do not serve."""


@dataclass(frozen=True, slots=True)
class Look:
    """The question what a TLS handshake with this address shows (`tls_look.look`). The answer is a `Seen`."""

    address: str


Questions: TypeAlias = "Generator[Ask | Look, Any, Diagnosis]"


class Standing(Enum):
    """How things stand between client and server."""

    SERVING = "serving"
    """A server takes calls, whatever it answers."""
    AWAITED = "awaited"
    """A server answers, and does not serve yet."""
    UNREACHED = "unreached"
    """No server answers; one may later."""
    HOPELESS = "hopeless"
    """Waiting cannot help: client or server must be set up differently."""
    UNKNOWN = "unknown"
    """No answer came in time, which says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """How a server stands, and why."""

    standing: Standing
    reason: str = ""
    """A sentence; empty while a server serves or nothing is known."""
    error_class: type[StatusError] = Unavailable

    def error(self, request_id: str) -> StatusError:
        """The error of a call that ends because of this diagnosis."""
        return self.error_class(self.reason, request_id=request_id)


SERVING = Diagnosis(standing=Standing.SERVING)
UNKNOWN = Diagnosis(standing=Standing.UNKNOWN)


def diagnose(target: str, tls: Tls | None, failure: StatusError | None = None) -> Questions:
    """Find out why calls do not get through. `failure` is that of one of them, if one has failed.

    The diagnosis has no reason where the failure is a server's own answer, which says everything itself.
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
        # The words are a server's, not gRPC's.
        return _awaited(target, failure.message) if isinstance(failure, Unavailable) and not known else SERVING
    if found.kind is Kind.UNHEALTHY:
        return (yield from _why_not_serving(target, tls))
    hopeless = found.sentence if found.kind in (Kind.HOPELESS, Kind.FOREIGN) else ""
    if found.kind in (Kind.CLOSED, Kind.FOREIGN) and found.address:
        hopeless = _hopeless((yield Look(found.address)), target) or hopeless
    return Diagnosis(
        standing=Standing.HOPELESS if hopeless else Standing.UNREACHED,
        reason=hopeless or found.sentence,
        error_class=type(failure),
    )


def _why_not_serving(target: str, tls: Tls | None) -> Questions:
    """Ask for the reason, which health does not tell."""
    answer = yield Ask.MODELS
    if not isinstance(answer, StatusError):
        return _awaited(target, next((info.reason for info in answer.models if info.reason), ""))
    found = read_failure(answer.message, target, encrypted=tls is not None)
    reason = answer.message if found is None else found.sentence
    if isinstance(answer, Unauthenticated | PermissionDenied):
        # The call itself would end like this once the server serves.
        return Diagnosis(standing=Standing.HOPELESS, reason=reason, error_class=type(answer))
    return _awaited(target, reason if isinstance(answer, Unavailable) else "")


def _awaited(target: str, reason: str) -> Diagnosis:
    return Diagnosis(standing=Standing.AWAITED, reason=f"{target} does not serve{reason and f' ({reason})'}")


def _hopeless(seen: Seen, target: str) -> str:
    """Why waiting cannot help, by what a handshake has shown; empty where it may."""
    match seen:
        case Seen.NOTHING:
            return ""
        case Seen.SPEAKS_TLS:
            return f"{target} speaks TLS, and the client does not; give it tls (--tls, or --ca FILE)"
        case Seen.WANTS_CERTIFICATE:
            return f"{target} wants a client certificate; give cert and key (--cert, --key)"
        case Seen.REFUSES_CERTIFICATE:
            return f"{target} refuses the client's certificate; is it of an authority that the server trusts?"
