"""What the two ends of a new link say first: the listener's Challenge, the dialler's Hello. No sockets here."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from tramontane.cluster.frames import Message
from tramontane.cluster.messages import PROTOCOL, Challenge, Hello, Role

NONCE_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0
"""A listener waits no longer for the whole Hello."""


class HandshakeError(Exception):
    """The other end is not one of us; the message is for the log and names no secret."""


def challenge() -> Challenge:
    """A fresh one for each link."""
    return Challenge(protocol=PROTOCOL, nonce=secrets.token_bytes(NONCE_BYTES))


def answer(message: Message, *, role: Role, name: str, epoch: int, secret: bytes) -> Hello:
    """The dialler's answer to the first message that it has received.

    Raises:
        HandshakeError: it is no Challenge, or one of another protocol.
    """
    if not isinstance(message, Challenge) or len(message.nonce) != NONCE_BYTES:
        raise HandshakeError("its first message is no challenge")
    _check_protocol(message.protocol)
    return Hello(protocol=PROTOCOL, role=role, name=name, epoch=epoch, proof=_proof(secret, message.nonce))


def check(message: Message, nonce: bytes, secret: bytes) -> Hello:
    """The listener's look at the first message that it has received.

    Raises:
        HandshakeError: it is no Hello, one of another protocol, or it proves no knowledge of the secret.
    """
    if not isinstance(message, Hello):
        raise HandshakeError("its first message is no hello")
    _check_protocol(message.protocol)
    if not hmac.compare_digest(message.proof, _proof(secret, nonce)):
        raise HandshakeError(f"{message.name!r} has another secret")
    return message


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise HandshakeError(f"it speaks protocol {protocol}, here is {PROTOCOL}")


def _proof(secret: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, nonce, hashlib.sha256) if secret else b""
