"""How the two ends of a new link prove to each other that they know the service's secret. No sockets here.

    listener ── Challenge(nonce) ──▶ dialler
    listener ◀─ Hello(role, name, epoch, nonce, proof) ── dialler
    listener ── Welcome(proof) ──▶ dialler

A proof is the HMAC of all that the Hello says, of both nonces, and of who proves it: one that was seen on another link,
of another dialler, or from the other end, is worth nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import msgpack

from tramontane.cluster.frames import Message
from tramontane.cluster.log_lines import quoted
from tramontane.cluster.messages import PROTOCOL, Challenge, Hello, Role, Welcome

NONCE_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0
"""A listener waits no longer for the whole Hello."""
MAX_HANDSHAKES = 32
"""Diallers whose Hello a listener awaits at a time; further ones are turned away."""


class HandshakeError(Exception):
    """The other end is not one of us; the message is for the log and names no secret."""


class Dialler:
    """The dialler's part of one handshake."""

    def __init__(self, *, role: Role, name: str, epoch: int, secret: bytes) -> None:
        self._role = role
        self._name = name
        self._epoch = epoch
        self._secret = secret
        self._expected = b""
        """The listener's proof."""

    def answer(self, message: Message) -> Hello:
        """The answer to the first message that has arrived.

        Raises:
            HandshakeError: it is no Challenge, or one of another protocol.
        """
        if not isinstance(message, Challenge) or len(message.nonce) != NONCE_BYTES:
            raise HandshakeError("its first message is no challenge")
        _check_protocol(message.protocol)
        nonce = secrets.token_bytes(NONCE_BYTES)
        said = (self._role, self._name, self._epoch, message.nonce, nonce)
        self._expected = _proof(self._secret, "listener", *said)
        return Hello(
            protocol=PROTOCOL,
            role=self._role,
            name=self._name,
            epoch=self._epoch,
            nonce=nonce,
            proof=_proof(self._secret, "dialler", *said),
        )

    def check(self, message: Message) -> None:
        """Look at the second message that has arrived.

        Raises:
            HandshakeError: it is no Welcome, or it proves no knowledge of the secret.
        """
        assert self._expected, "check comes after answer"
        if not isinstance(message, Welcome):
            raise HandshakeError("its second message is no welcome")
        if not hmac.compare_digest(message.proof, self._expected):
            raise HandshakeError("the listener has another secret")


class Greeter:
    """The listener's part of one handshake."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.challenge = Challenge(protocol=PROTOCOL, nonce=secrets.token_bytes(NONCE_BYTES))
        """To be sent first."""

    def check(self, message: Message) -> Hello:
        """Look at the first message that has arrived.

        Raises:
            HandshakeError: it is no Hello, one of another protocol, or it proves no knowledge of the secret.
        """
        if not isinstance(message, Hello) or len(message.nonce) != NONCE_BYTES:
            raise HandshakeError("its first message is no hello")
        _check_protocol(message.protocol)
        if not hmac.compare_digest(message.proof, self._proof("dialler", message)):
            raise HandshakeError(f"{quoted(message.name)} has another secret")
        return message

    def welcome(self, hello: Hello) -> Welcome:
        """The answer to a Hello that `check` has let pass."""
        return Welcome(proof=self._proof("listener", hello))

    def _proof(self, by: str, hello: Hello) -> bytes:
        return _proof(self._secret, by, hello.role, hello.name, hello.epoch, self.challenge.nonce, hello.nonce)


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise HandshakeError(f"it speaks protocol {protocol}, here is {PROTOCOL}")


def _proof(secret: bytes, by: str, role: Role, name: str, epoch: int, listeners: bytes, diallers: bytes) -> bytes:
    """`by` says whose proof it is; the last two are the nonces."""
    assert secret, "a proof under an empty secret is none"
    said = msgpack.packb([by, PROTOCOL, role.value, name, epoch, listeners, diallers])
    return hmac.digest(secret, said, hashlib.sha256)
