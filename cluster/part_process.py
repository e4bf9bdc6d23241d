"""What the process of a part sets up on its node before it works: its log file, and its place among the others."""

from __future__ import annotations

import os

from tramontane.cluster.log_file import start_log
from tramontane.cluster.private_folder import KEPT_LOGS, SharedFolder, logs_folder, sockets_folder
from tramontane.cluster.site import Site, configured_secret
from tramontane.cluster.spec import ServiceSpec


def open_log(spec: ServiceSpec, part: str) -> SharedFolder:
    """From here on, this process logs into a file of the part's name in the folder that is returned."""
    folder = SharedFolder(logs_folder(spec.identity), keep=KEPT_LOGS)
    start_log(folder.path / f"{part}.log", spec.log_level)
    return folder


class PartProcess:
    """The process of a part that has links to others."""

    def __init__(self, spec: ServiceSpec, part: str, *, node: str, host: str) -> None:
        """`host` is this node's address for others; links from there need a secret that the operator has configured.

        Raises:
            ValueError, OSError: a folder is not private, or the configured secret cannot be read.
        """
        self._logs = open_log(spec, part)
        self._sockets = SharedFolder(sockets_folder(spec.identity))
        configured = configured_secret(os.environ)
        self.site = Site(
            node=node,
            sockets=self._sockets.path,
            secret=configured or self._sockets.secret(),
            host=host if configured else None,
            silence_s=spec.link_silence_s,
        )

    def leave(self) -> None:
        """The part has closed its links: leave no socket and no secret, but the log."""
        self._sockets.leave()
        self._logs.leave(remove=False)
