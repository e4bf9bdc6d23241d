"""What a process of the service must know of its own place to link up with others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tramontane.stages.folder import read_whole

LONGEST_SECRET = 1 << 20
LINK_SILENCE_S = 45.0
"""The default of `--link-silence`."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One process's place among the others."""

    node: str
    """Ray's id of its node. A listener on the same node is dialled over its unix socket, on another over TCP."""
    sockets: Path
    """The private folder in which its unix sockets lie; see `private_folder.py`."""
    secret: bytes = field(repr=False)
    """Both ends of every link prove that they know it."""
    host: str | None = None
    """The address on which it takes links from other nodes; None takes none."""
    silence_s: float = LINK_SILENCE_S
    """A link on which nothing has arrived for so long is closed; an idle one carries heartbeats."""

    def __post_init__(self) -> None:
        assert self.secret, "a proof under an empty secret is none"

    def socket_path(self, name: str) -> Path:
        """Where the part called `name` listens in this process: another process of that name must not be in its way."""
        return self.sockets / f"{name}-{os.getpid()}.sock"


def configured_secret(environment: Mapping[str, str]) -> bytes | None:
    """The service's secret from this node's environment, or from the file that it names; None where there is none.

    Links between nodes need one. It is never in the spec, nor in a log.

    Raises:
        ValueError: the file cannot be read, or is empty.
    """
    if path := environment.get("TRAMONTANE_SECRET_FILE"):
        try:
            secret = read_whole(Path(path), LONGEST_SECRET).strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"TRAMONTANE_SECRET_FILE is {path}, which cannot be read: {reason}") from None
        if not secret:
            raise ValueError(f"TRAMONTANE_SECRET_FILE is {path}, which is empty")
        return secret
    return environment.get("TRAMONTANE_SECRET", "").encode() or None
