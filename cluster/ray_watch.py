"""Notices within seconds that Ray's servers are gone.

Ray itself says nothing for a minute and then ends this process with a line of its own. Two signs are read: whether the
servers' ports refuse connections, which tells of a process that has ended, and how long the GCS has left a question
without an answer, which tells of one that hangs or cannot be reached. A pause is no end, so the latter has a limit that
pauses stay below.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tramontane.cluster.polling import Poll

PERIOD_S = 1.0
CONNECT_TIMEOUT_S = 1.0
GCS_LIMIT_S = 45.0
"""Ray's processes end themselves after 60 s without a GCS. One with storage may come back before."""


class RayGone(ConnectionError):  # noqa: N818  (an event as much as an error)
    """Ray can no longer carry a service."""


@dataclass(frozen=True)
class Servers:
    """Where Ray's servers listen: host and port."""

    gcs: tuple[str, int]
    raylet: tuple[str, int]
    """Of this process's node."""


@dataclass(frozen=True)
class Refusals:
    """Which of them refuse connections."""

    gcs: bool
    raylet: bool


class RayWatch:
    """Watches from `with` on until its end."""

    def __init__(
        self,
        servers: Servers,
        ask_gcs: Callable[[], object],
        *,
        gcs_may_return: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask_gcs` is any call that the GCS answers. Nobody starts the GCS of a Ray of our own again."""
        self._gcs_may_return = gcs_may_return
        self._refusals = Poll(lambda: Refusals(_refuses(*servers.gcs), _refuses(*servers.raylet)), PERIOD_S)
        self._gcs = Poll(lambda: _answers(ask_gcs), PERIOD_S, now)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._refusals)
        self._stack.enter_context(self._gcs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self) -> None:
        """Does nothing as long as Ray is there.

        Raises:
            RayGone: says in one line what is gone.
        """
        gone = what_is_gone(self._refusals.latest(), self._gcs.silent_s(), gcs_may_return=self._gcs_may_return)
        if gone:
            raise RayGone(gone)


def what_is_gone(refusals: Refusals | None, gcs_silent_s: float, *, gcs_may_return: bool) -> str:
    """One line, empty as long as Ray is there.

    >>> what_is_gone(Refusals(gcs=True, raylet=False), 3.0, gcs_may_return=False)
    "Ray's GCS is gone"
    >>> what_is_gone(Refusals(gcs=True, raylet=False), 3.0, gcs_may_return=True)
    ''
    """
    if refusals is not None and refusals.raylet:
        return "the raylet of this node is gone"
    if refusals is not None and refusals.gcs and not gcs_may_return:
        return "Ray's GCS is gone"
    if gcs_silent_s >= GCS_LIMIT_S:
        return f"Ray's GCS has not answered for {gcs_silent_s:.0f} s"
    return ""


def _refuses(host: str, port: int) -> bool:
    """Whether nobody listens there. Any other trouble may be of this end or of the way."""
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _answers(ask: Callable[[], object]) -> bool | None:
    try:
        ask()
    except Exception:
        return None
    return True
