"""How users get in: where the gateway listens, and what it asks of them. `exposure.py` checks it."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """Files are paths on the gateway's node; their content is read there, and is never in here."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    tls_cert: str | None = None
    """PEM file of the server's certificate chain; None is no TLS."""
    tls_key: str | None = None
    """PEM file of its private key."""
    client_ca: str | None = None
    """PEM file of the authorities of whom every client needs a certificate; None asks for none."""
    token_file: str | None = None
    """File of the bearer tokens of which every call needs one; None asks for none."""
    max_connection_age_s: float = 3600.0
    """A connection older than this is exchanged for a new one, which may lead to another gateway; 0 is never."""

    @property
    def is_local(self) -> bool:
        """Only this machine gets in. A name other than localhost is not known to."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"
