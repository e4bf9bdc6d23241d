"""gRPC's words for a failed connection, turned into a sentence for a person. Pure.

The details of a call that does not wait hold the last failure of its channel. Their words differ between versions of
gRPC, so this looks for the parts that come from below gRPC: the texts of errno and BoringSSL's names of errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote

_OF_CHANNEL = re.compile(
    r"(?:failed to connect to all addresses|connections to all backends failing); last error: (?:[A-Z_]+: )?"
    r"(?:(?P<kind>ipv4|ipv6|unix|vsock):(?P<address>\S+): )?(?P<text>.*)",
    re.DOTALL,
)
_OF_NAME = re.compile(
    r"(?:errors resolving|DNS resolution failed for) (?P<name>\S+?):? ?(?:\[field:.*?error:)?(?P<text>.*)"
)
_NO_GRPC = re.compile(r"Received http2 header with status: (?P<status>\d+)")
_PASSING_STATUSES = ("429", "502", "503", "504")
"""HTTP statuses of a proxy whose server is away for the moment."""


class Kind(Enum):
    """What kind of failure it is, and so whether waiting can help."""

    UNREACHED = "unreached"
    """No server was reached; that may change."""
    HOPELESS = "hopeless"
    """A server was reached with which this client cannot talk as it is set up."""
    CLOSED = "closed"
    """The server closed the connection before its first byte. Only a handshake of our own tells whether TLS is why."""
    FOREIGN = "foreign"
    """What answered does not speak gRPC. A handshake of our own tells whether it speaks TLS."""
    UNHEALTHY = "unhealthy"
    """A server was reached, and its health is not SERVING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no connection."""

    kind: Kind
    sentence: str
    address: str = ""
    """The failed server's HOST:PORT or socket path; empty where gRPC does not say."""


def read_failure(text: str, target: str, *, encrypted: bool) -> Failure | None:
    """The channel's failure that a status's details tell; None where they tell something else.

    >>> read_failure(
    ...     "connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: "
    ...     "Failed to connect to remote host: Connection refused", "localhost:1", encrypted=False
    ... ).sentence
    'nobody listens at localhost:1 (127.0.0.1:1): is the server started, and the port right?'
    """
    if match := _NO_GRPC.search(text):
        sentence = f"what answers at {target} speaks HTTP, not gRPC (status {match['status']}); is a proxy in between?"
        passing = match["status"] in _PASSING_STATUSES
        return Failure(kind=Kind.UNREACHED if passing else Kind.HOPELESS, sentence=sentence)
    if match := _OF_NAME.match(text):
        reason = match["text"].rstrip("]").rpartition(": ")[2] or "it cannot be resolved"
        return Failure(
            kind=Kind.UNREACHED, sentence=f"the host of {target} is not known ({reason}): is the name right?"
        )
    match = _OF_CHANNEL.match(text)
    if match is None:
        return None
    address = unquote(match["address"] or "")
    where = target if address in ("", target) or target.endswith(f":{address}") else f"{target} ({address})"
    kind, sentence = _of_channel(match["text"], where, encrypted=encrypted)
    return Failure(kind=kind, sentence=sentence, address=address)


def _of_channel(text: str, where: str, *, encrypted: bool) -> tuple[Kind, str]:
    """Kind and sentence. The order counts: gRPC's text may hold several of these parts."""
    if "backend unhealthy" in text or "health check call failed" in text:
        return Kind.UNHEALTHY, f"{where} does not serve"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = re.search(r"CERTIFICATE_VERIFY_FAILED: (.*?)(?:: OK)?$", text)
        said = f" ({reason[1]})" if reason else ""
        return Kind.HOPELESS, (
            f"the certificate of {where} is not trusted{said}; ca (--ca) names the file of the authorities to trust"
        )
    if "Hostname Verification" in text:
        return Kind.HOPELESS, (
            f"the certificate of {where} is for another name; dial one that it carries, or say which that is by "
            "server_name (--server-name)"
        )
    if "WRONG_VERSION_NUMBER" in text or "HTTP_REQUEST" in text:
        return Kind.HOPELESS, f"{where} does not speak TLS; leave tls (--tls, --ca, ...) out if that is meant"
    if "Tls handshake failed" in text:
        name = re.search(r"OPENSSL_internal:(\w+)", text)
        return Kind.HOPELESS, f"the TLS handshake with {where} failed ({name[1] if name else text})"
    if "HTTP/2" in text:
        return Kind.FOREIGN, f"what answers at {where} does not speak gRPC"
    if "Connection refused" in text:
        return Kind.UNREACHED, f"nobody listens at {where}: is the server started, and the port right?"
    if "SETTINGS" in text or "handshaker shutdown" in text or "Endpoint closing" in text:
        return (
            Kind.UNREACHED,
            f"{where} takes connections and says nothing: does the server hang, or is it another's port?",
        )
    if "Socket closed" in text or "Connection reset" in text or "Broken pipe" in text:
        after = "after the TLS handshake" if encrypted and "Handshake read" not in text else "before a word"
        return Kind.CLOSED, f"{where} closes connections {after}: is it a server of Tramontane?"
    rest = text.removeprefix("Failed to connect to remote host: ").rpartition("error: ")[2]
    return Kind.UNREACHED, f"{where} cannot be reached ({rest})"
