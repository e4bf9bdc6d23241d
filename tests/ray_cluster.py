"""A Ray cluster of some nodes on this machine, started as an operator would, and ended by its own process ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from service import eventually

RAY = str(Path(sys.executable).with_name("ray"))


class RayCluster:
    """One raylet for each entry of `cpus`; the first is the head."""

    def __init__(self, *cpus: int) -> None:
        self.secret = secrets.token_hex(16)
        self.folder = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.environment = os.environ | {"RAY_AUTH_MODE": "disabled", "TRAMONTANE_SECRET": self.secret}
        common = ["--disable-usage-stats", "--object-store-memory", "80000000"]
        self.nodes: list[subprocess.Popen[bytes]] = []
        for index, count in enumerate(cpus):
            place = (
                ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", self.folder]
                if index == 0
                else ["--address", self.address]
            )
            command = [RAY, "start", "--block", "--num-cpus", str(count), *place, *common]
            self.nodes.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            if index == 0:
                eventually(lambda: _open(port), 120)

    def end(self) -> None:
        """End every process that the nodes have started, and nothing else."""
        processes = [psutil.Process(node.pid) for node in self.nodes]
        for process in list(processes):
            processes.extend(process.children(recursive=True))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for node in self.nodes:
            node.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
