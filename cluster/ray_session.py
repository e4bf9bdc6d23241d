"""The files that a Ray of our own writes: gone with it when the service has ended well, else there to be looked at."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import psutil

END_TIMEOUT_S = 10.0
"""For Ray's processes, once Ray has been told to end."""


class OwnSession:
    """One session's folder, and nothing else in Ray's temporary folder: other sessions lie there too."""

    def __init__(self, folder: Path) -> None:
        """To be made while Ray runs."""
        self.folder = folder
        self._made = folder.stat()
        self._processes: list[psutil.Process] = []

    def before_shutdown(self) -> None:
        """Remember who writes there: orphans cannot be found any more afterwards."""
        children = psutil.Process().children(recursive=True)
        self._processes = [process for process in children if not _is_reaper(process)]

    def remove(self) -> bool:
        """Remove it, once nobody writes there any more. False where that did not succeed."""
        psutil.wait_procs(self._processes, timeout=END_TIMEOUT_S)
        with contextlib.suppress(OSError):
            # Ray's temporary folder is open to all: what lies at our path must be what was there.
            if os.path.samestat(self._made, self.folder.lstat()):
                shutil.rmtree(self.folder, ignore_errors=True)
            latest = self.folder.parent / "session_latest"
            if os.readlink(latest) == str(self.folder):
                latest.unlink()
        return not self.folder.exists()


def _is_reaper(process: psutil.Process) -> bool:
    """It waits for us, as we would for it."""
    with contextlib.suppress(psutil.Error):
        return "tramontane.cluster.reaper" in process.cmdline()
    return False
