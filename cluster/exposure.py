"""Whom the port is open to: what `serve` refuses before anything starts, and what it warns of."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tramontane.cluster.entrance import Entrance
from tramontane.cluster.tls import read_identity, warnings_of_dates
from tramontane.cluster.tokens import read_tokens

OTHERS = 0o077
"""The permissions of a file's group and of everybody."""


def check_entrance(entrance: Entrance, *, insecure: bool) -> list[str]:
    """Read all files once, and say what the operator should think twice about, a line each.

    Raises:
        ValueError: an option lacks its companion, a file is not right, or the port would be open to other machines in
            clear without `insecure`.
    """
    if (entrance.tls_cert is None) != (entrance.tls_key is None):
        given, lacking = ("cert", "key") if entrance.tls_key is None else ("key", "cert")
        path = entrance.tls_cert or entrance.tls_key
        raise ValueError(f"--tls-{given} is {path}, and --tls-{lacking} is not given: TLS needs both")
    if entrance.client_ca is not None and entrance.tls_cert is None:
        raise ValueError(f"--client-ca is {entrance.client_ca}, and there is no TLS: it needs --tls-cert and --tls-key")
    if not entrance.is_local and entrance.tls_cert is None and not insecure:
        raise ValueError(
            f"--host is {entrance.host}, beyond loopback, and there is no TLS: give --tls-cert and --tls-key, "
            "or --insecure where the network is trusted"
        )
    if entrance.tls_cert is not None:
        read_identity(entrance.tls_cert, entrance.tls_key, entrance.client_ca)
        dates = warnings_of_dates(entrance.tls_cert, entrance.client_ca, datetime.now(UTC))
    else:
        dates = []
    if entrance.token_file is not None:
        read_tokens(entrance.token_file)
    return [*_warnings_of_reach(entrance), *_warnings_of_files(entrance), *dates]


def _warnings_of_reach(entrance: Entrance) -> list[str]:
    if entrance.is_local:
        return []
    reach = f"--host is {entrance.host}, beyond loopback"
    clear = entrance.tls_cert is None
    if entrance.token_file is not None:
        return [f"{reach}, without TLS: tokens travel in clear, and who reads one may use it"] if clear else []
    if entrance.client_ca is not None:
        return []
    return [f"{reach}, without --token-file{'' if clear else ' or --client-ca'}: anyone who reaches it may use it"]


def _warnings_of_files(entrance: Entrance) -> list[str]:
    secrets = {"--tls-key": entrance.tls_key, "--token-file": entrance.token_file}
    return [
        f"{option} is {path}, which others than its owner may open: `chmod 600` it"
        for option, path in secrets.items()
        if path is not None and Path(path).stat().st_mode & OTHERS
    ]
