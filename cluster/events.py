"""What `serve` and `down` say of their work: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json

import click

COLOURS = {"ready": "green", "recovered": "green", "warning": "yellow", "degraded": "yellow", "broken": "red"}
"""Of an event's line, where it goes to a terminal."""
TROUBLES = ("warning", "degraded", "broken")
"""These lines go to stderr. JSON does not: a program reads all events from one place, in their order."""


class Events:
    """Tells an operator what happens, as it happens."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def tell(self, event: str, message: str, **facts: str | float) -> None:
        """One event: its name and facts for programs, its message for both."""
        if self._as_json:
            click.echo(json.dumps({"event": event, "message": message, **facts}))
        else:
            click.secho(message, fg=COLOURS.get(event), err=event in TROUBLES)
