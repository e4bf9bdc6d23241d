"""A real service in a process of its own: `tramontane serve`, as an operator would start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

READY_TIMEOUT_S = 120


class Service:
    """Runs `tramontane serve` with the given options until `end`."""

    def __init__(self, *options: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is added to this process's."""
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("tramontane"), "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = READY_TIMEOUT_S) -> re.Match[str]:
        """The first line of output that matches."""

        def found() -> re.Match[str] | None:
            return next((match for line in list(self.lines) if (match := re.search(pattern, line))), None)

        eventually(lambda: found() is not None or self.process.poll() is not None, timeout_s)
        match = found()
        assert match is not None, f"no line matches {pattern!r}; exit status {self.process.poll()}:\n{self.output}"
        return match

    @property
    def target(self) -> str:
        return self.wait_for(r"^ready: .* on (\S+)")[1]

    @property
    def logs(self) -> str:
        return self.wait_for(r"^logs in (\S+)")[1]

    @property
    def ray_logs(self) -> str:
        return self.wait_for(r"^logs in \S+ \(Ray's own in (\S+)\)")[1]

    @property
    def identity(self) -> str:
        return Path(self.logs).name

    def end(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C (to the whole process group, as a terminal sends it), and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until it holds; the generous limit only ends a test that has failed."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"did not hold within {timeout_s} s"
        time.sleep(0.05)
