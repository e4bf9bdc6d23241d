"""Starts a Ray of our own for `serve`, or joins one that runs."""

from __future__ import annotations

import atexit
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from tramontane.cluster.spec import NAMESPACE

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing of ours goes through Ray's object store; this is near its least size."""
LOOPBACK = "127.0.0.1"
LONGEST_SOCKET = 107
"""The most bytes of a unix socket's path."""
SOCKET_OF_RAY = "/ray/session_2026-11-28_17-30-00_000000_4194304/sockets/plasma_store"
"""The longest path that Ray makes below the temporary folder."""


def start_ray(address: str | None) -> None:
    """Start a Ray of our own, or join one. Ray reads its environment when it is imported, so that is set first.

    Raises:
        ValueError, ConnectionError: see `joinable_address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # A Ray of one node. Else Ray takes the loopback's address for a mistake, and listens on all interfaces.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        take_a_token()
    import ray

    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    if address is None:
        _start_reaper()
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": LOOPBACK}
        ray.init(address="local", **quiet)
        return
    from tramontane.cluster.ray_joining import joinable_address

    address = joinable_address(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConnectionError(f"cannot join the Ray at {address}: {' '.join(str(error).split())}") from None


def take_a_token() -> None:
    """Make Ray's client use a token, unless the user says otherwise. Ray reads that once, when it is imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_temporary_folder(environment: Mapping[str, str]) -> None:
    """Check that the sockets of a Ray of our own fit below the temporary folder.

    Raises:
        ValueError: the folder's path is too long; the message names the variable that sets it.
    """
    # The order in which Ray looks for it.
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in environment else "TMPDIR"
    folder = environment.get(variable, "/tmp")  # noqa: S108
    size, most = len(os.fsencode(folder)), LONGEST_SOCKET - len(SOCKET_OF_RAY)
    if size > most:
        raise ValueError(
            f"{variable} is {folder}, which has {size} bytes; {most} are the limit where Ray's sockets lie below it: "
            "set RAY_TMPDIR, or TMPDIR, to a shorter one"
        )


def leave(status: int) -> NoReturn:
    """End this process where Ray is gone: its own end would wait for its servers, and leaving that out crashes.

    All other handlers run: what is left of a Ray of our own ends, too.
    """
    import ray

    atexit.unregister(ray._private.worker.shutdown)
    atexit._run_exitfuncs()
    os._exit(status)


def _start_reaper() -> None:
    """See `reaper.py`; the pipe to it stays open as long as this process lives."""
    command = [sys.executable, "-m", "tramontane.cluster.reaper", str(os.getpid())]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  (our own)
    atexit.register(reaper.communicate)
