"""A TLS handshake of our own with a server that has closed a connection before its first byte: is TLS the reason?

gRPC does not say why such a connection was closed.
"""

from __future__ import annotations

import socket
import ssl
from enum import Enum

from tramontane.client.channel import Tls

LOOK_S = 2.0
"""How long connecting may take, and each read."""
CERTIFICATE_REQUEST = (22, 13)
"""A handshake's message: the server asks for the client's certificate."""


class Seen(Enum):
    """What a TLS handshake of our own has shown."""

    NOTHING = "nothing"
    """The server does not speak TLS, or it does and nothing is wrong with it."""
    SPEAKS_TLS = "speaks TLS"
    """And the client does not."""
    WANTS_CERTIFICATE = "wants a certificate"
    """And the client has none."""
    REFUSES_CERTIFICATE = "refuses the certificate"
    """The certificate that the client has."""


def look(address: str, tls: Tls | None) -> Seen:
    """Shake hands with `address`, HOST:PORT or a socket's path. Nothing is sent but what a handshake needs.

    The server's certificate is not verified: gRPC does that for real connections, and this one only finds a reason.
    """
    try:
        with _connect(address) as connection:
            return _shake_hands(connection, tls)
    except OSError:
        return Seen.NOTHING


def _connect(address: str) -> socket.socket:
    if "/" in address or ":" not in address:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LOOK_S)
        connection.connect(address)
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port or 0)), LOOK_S)


def _shake_hands(connection: socket.socket, tls: Tls | None) -> Seen:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    has_certificate = tls is not None and tls.cert is not None and tls.key is not None
    is_asked = False

    def note(_: object, direction: str, _version: int, content: int, message: int, _data: bytes) -> None:
        nonlocal is_asked
        is_asked |= direction == "read" and (content, message) == CERTIFICATE_REQUEST

    # A proxy whose server is away closes as one does that misses a certificate. Only what the server sends tells.
    context._msg_callback = note  # type: ignore[attr-defined]
    try:
        if tls is not None and tls.cert is not None and tls.key is not None:
            context.load_cert_chain(tls.cert, tls.key)
        with context.wrap_socket(connection) as encrypted:
            if tls is None:
                return Seen.SPEAKS_TLS
            # With TLS 1.3 the server looks at the client's certificate after the handshake. A gRPC server that likes it
            # begins to speak at once; one that does not closes, some with an alert.
            if encrypted.recv(1):
                return Seen.NOTHING
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return Seen.NOTHING
        if tls is None:
            return Seen.SPEAKS_TLS
    if not is_asked:
        return Seen.NOTHING
    return Seen.REFUSES_CERTIFICATE if has_certificate else Seen.WANTS_CERTIFICATE
