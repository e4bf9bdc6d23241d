"""The options that the command line's verbs share: where the server is, how to reach it, and `--json`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tramontane.client.channel import ClientOptions, Tls
from tramontane.client.client import Client

DEFAULT_TARGET = "127.0.0.1:50051"

_File = click.Path(exists=True, dir_okay=False, path_type=Path)


def connects(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that say where the server is, and hand it a client for its first argument."""

    @click.option(
        "--target",
        envvar="TRAMONTANE_TARGET",
        show_envvar=True,
        default=DEFAULT_TARGET,
        show_default=True,
        help="Server: HOST:PORT, ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT.",
    )
    @click.option("--tls", is_flag=True, help="Encrypt, and trust the usual authorities.")
    @click.option("--ca", type=_File, help="Encrypt, and trust the authorities of this PEM file.")
    @click.option("--cert", type=_File, help="Encrypt, with this client certificate (PEM).")
    @click.option("--key", type=_File, help="Its private key (PEM).")
    @click.option("--server-name", help="Encrypt, and ask for a certificate of this name, whatever the target's.")
    @click.option(
        "--token-file", type=_File, envvar="TRAMONTANE_TOKEN_FILE", show_envvar=True, help="Holds a bearer token."
    )
    @click.option("--clear-token", is_flag=True, help="Let the token travel without TLS beyond this machine.")
    @functools.wraps(command)
    def connected(
        target: str,
        tls: bool,
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        server_name: str | None,
        token_file: Path | None,
        clear_token: bool,
        **arguments: Any,
    ) -> None:
        encrypt = bool(tls or ca or cert or key or server_name)
        try:
            options = ClientOptions(
                tls=Tls(ca=ca, cert=cert, key=key, server_name=server_name) if encrypt else None,
                token=token_file.read_text().strip() if token_file else None,
                clear_token=clear_token,
            )
            client = Client(target, options)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from None
        with client:
            command(client, **arguments)

    return connected


def prints_json(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the option that makes its output one JSON value."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead.")(command)
