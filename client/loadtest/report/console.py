"""Where reports are printed. Whoever reads one may leave early, as `head` does in `tramontane bench run ... | head`:
what is left is then said to nobody, and the exit status is the run's all the same.
"""

from __future__ import annotations

import os
import sys
from typing import IO

from rich.console import Console

MAX_COLUMNS = 120


class ReportConsole(Console):
    """A console that goes on in silence when its reader has left."""

    def on_broken_pipe(self) -> None:
        """Instead of the end of the program, with the status of wrong answers."""
        self.quiet = True
        _discard(self.file)


def open_console(file: IO[str] | None = None) -> ReportConsole:
    """A console for reports: as wide as the terminal up to 120 columns, and 120 where there is none."""
    console = ReportConsole(file=file, highlight=False)
    if not console.is_terminal or console.width > MAX_COLUMNS:
        console.width = MAX_COLUMNS
    return console


def print_line(text: bytes) -> None:
    """One line on stdout, as it is."""
    try:
        sys.stdout.buffer.write(text + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def _discard(stream: IO[str]) -> None:
    """Let what is still to be written, and what the interpreter flushes at its end, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
