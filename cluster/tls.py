"""The gateway's side of TLS: its certificate, and the authorities of its clients, taken up anew when files change."""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime

import grpc

from tramontane.cluster.certificate_dates import validities
from tramontane.cluster.reloading import Reloading, read_bytes

log = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 20
"""Of one PEM file."""


def server_credentials(cert: str, key: str, client_ca: str | None) -> grpc.ServerCredentials:
    """TLS as these files say at each handshake; connections that are open stay as they are. With `client_ca` a client
    has to prove itself by a certificate of one of its authorities.

    Raises:
        ValueError: see `read_identity`.
    """
    paths = [path for path in (cert, key, client_ca) if path is not None]

    def read() -> grpc.ServerCertificateConfiguration:
        read_now = read_identity(cert, key, client_ca)
        for warning in warnings_of_dates(cert, client_ca, datetime.now(UTC)):
            log.warning("%s", warning)
        return read_now

    identity = Reloading("certificates", paths, read)
    in_use = first = identity.value()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake; None is no change."""
        nonlocal in_use
        latest = identity.value()
        if latest is in_use:
            return None
        in_use = latest
        return latest

    return grpc.dynamic_ssl_server_credentials(
        first,
        fetch,  # type: ignore[arg-type]  # the stubs leave None out
        require_client_authentication=client_ca is not None,
    )


def read_identity(cert: str, key: str | None, client_ca: str | None) -> grpc.ServerCertificateConfiguration:
    """Read and check the files. gRPC itself says nothing of a wrong one until a client's handshake fails.

    Raises:
        ValueError: one cannot be read, is no PEM of its kind, or the key is not the certificate's.
    """
    assert key is not None, "a certificate comes with its key"
    chain, secret = read_bytes("--tls-cert", cert, LIMIT_BYTES), read_bytes("--tls-key", key, LIMIT_BYTES)
    authorities = None if client_ca is None else read_bytes("--client-ca", client_ca, LIMIT_BYTES)
    _check_certificates("--tls-cert", cert)
    if client_ca is not None:
        _check_certificates("--client-ca", client_ca)
    try:
        # The empty password keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        # OpenSSL keeps one certificate for each kind of key, so the reason differs where the key is of another kind.
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise ValueError(f"--tls-key is {key}, which is not the key of --tls-cert, {cert}") from None
        if error.reason and "KEY" in error.reason:  # EE_KEY_TOO_SMALL and its like
            reason = error.reason.lower().replace("_", " ")
            raise ValueError(f"--tls-key is {key}, with --tls-cert {cert}, which TLS cannot use: {reason}") from None
        raise ValueError(f"--tls-key is {key}, which holds no private key in PEM without a password") from None
    return grpc.ssl_server_certificate_configuration([(secret, chain)], authorities)


def warnings_of_dates(cert: str, client_ca: str | None, now: datetime) -> list[str]:
    """A sentence about each certificate in the files that is not valid now, which whoever checks the dates refuses.

    Raises:
        ValueError: a file cannot be read.
    """
    warnings = []
    for option, path in (("--tls-cert", cert), ("--client-ca", client_ca)):
        found = [] if path is None else validities(read_bytes(option, path, LIMIT_BYTES))
        for number, validity in enumerate(found, 1):
            if flaw := validity.flaw(now):
                warnings.append(f"{option} is {path}, in which certificate {number} of {len(found)} {flaw}")
    return warnings


def _check_certificates(option: str, path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{option} is {path}, which holds no certificate in PEM") from None
