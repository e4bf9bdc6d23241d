"""What `serve` and `down` say of their work: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TextIO

import click

COLOURS = {"ready": "green", "recovered": "green", "warning": "yellow", "degraded": "yellow", "broken": "red"}
"""Of an event's line, where it goes to a terminal."""
TROUBLES = ("warning", "degraded", "broken")
"""These lines go to stderr. JSON does not: a program reads all events from one place, in their order."""


class Events:
    """Tells an operator what happens, as it happens. What cannot be written is dropped: nobody reads it."""

    def __init__(self, *, as_json: bool, out: TextIO | None = None) -> None:
        """Without a stream, to stdout."""
        self._as_json = as_json
        self._out = out

    @classmethod
    def alone_on_stdout(cls, *, as_json: bool) -> Events:
        """Events that share stdout with nobody: what else this process prints, Ray's C++ included, goes to stderr."""
        # A stream that was closed before we began has no object; its number may be another file's by now.
        if sys.stdout is None:
            return cls(as_json=as_json)
        sys.stdout.flush()
        out = os.fdopen(os.dup(1), "w", errors="backslashreplace")
        if sys.stderr is not None:
            os.dup2(2, 1)
        else:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        return cls(as_json=as_json, out=out)

    def tell(self, event: str, message: str, **facts: str | float) -> None:
        """One event: its name and facts for programs, its message for both."""
        with contextlib.suppress(OSError):
            if self._as_json:
                click.echo(json.dumps({"event": event, "message": message, **facts}), file=self._out)
            elif event in TROUBLES:
                click.secho(message, fg=COLOURS.get(event), err=True)
            else:
                click.secho(message, fg=COLOURS.get(event), file=self._out)
