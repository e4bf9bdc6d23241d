"""The `tramontane` command: its own verbs, and those that other packages add by the entry-point group.

A verb of the group `tramontane.commands` is imported when it is run, not when it is listed: `tramontane --help` works
without the packages that the verb needs, and says what it is for by reading its docstring from the source. The entry
point says in brackets which extra brings those packages: `bench = "tramontane.client.loadtest.cli:bench [bench]"`.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib.util
import io
import os
import sys
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TextIO

import click

from tramontane.client.errors import StatusError, TramontaneError, Unauthenticated

ENTRY_POINT_GROUP = "tramontane.commands"
EXTRA = "serve"
"""The extra of a verb whose entry point names none."""
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a disk that is full or broken, which a line on stderr tells."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


class CommandGroup(click.Group):
    """A click group that adds verbs lazily and ends every failure with one line on stderr."""

    @cached_property
    def added(self) -> dict[str, EntryPoint]:
        """The entry points by name. A verb of our own is never replaced."""
        points = entry_points(group=ENTRY_POINT_GROUP)
        return {point.name: point for point in points if point.name not in self.commands}

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line. Neither the terminal's encoding nor a full disk ends it in a traceback."""
        print_everything(sys.stdout)
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if error.errno not in WRITE_ERRORS:
                raise
            drop_output(sys.stdout)
            where = f"{error.filename}: " if error.filename else ""
            with contextlib.suppress(OSError):
                click.echo(f"Error: the output cannot be written: {where}{error.strerror}", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs in alphabetical order; nothing is imported for it."""
        return sorted([*self.commands, *self.added])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, or a stand-in that imports it when it is run."""
        if cmd_name in self.added:
            return AddedCommand(self.added[cmd_name])
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen verb.

        Raises:
            click.ClickException: for click to print as one line, with exit status 1.
            click.exceptions.Exit: after Ctrl-C.
        """
        try:
            return super().invoke(ctx)
        except TramontaneError as error:
            raise click.ClickException(_one_line(describe(error))) from None
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            point = self.added.get(ctx.invoked_subcommand or "")
            if point is None or missing in ("", "tramontane"):
                raise  # a fault of ours, not a package that the user has not installed
            raise click.ClickException(
                f"`tramontane {point.name}` needs {missing}, which is not installed: "
                f"pip install '.[{','.join(point.extras) or EXTRA}]' in a checkout of Tramontane"
            ) from None


class AddedCommand(click.Command):
    """Stands for a verb, or a group of verbs, that is not imported yet: knows its name and what it is for."""

    def __init__(self, point: EntryPoint) -> None:
        super().__init__(point.name, help=docstring(point))
        self._point = point

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The real command's context; click runs the command that it names."""
        try:
            command: click.Command = self._point.load()
        except ModuleNotFoundError:
            if extra.get("resilient_parsing"):  # a shell completes a line: it has nowhere to show an error
                return super().make_context(info_name, args, parent, **extra)
            raise
        return command.make_context(info_name, args, parent, **extra)


def docstring(point: EntryPoint) -> str:
    """The docstring of an entry point's function, read from its source; empty where there is none."""
    try:
        spec = importlib.util.find_spec(point.module)
    except ModuleNotFoundError:
        return ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return ast.get_docstring(node) or ""
    return ""


def print_everything(output: TextIO) -> None:
    """Make characters that the terminal's encoding lacks print as `\\u2014`; by default they are errors."""
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="backslashreplace")


def drop_output(output: TextIO) -> None:
    """Discard what the stream holds and could not write; otherwise Python tries again when it exits."""
    try:
        output.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())
        os.close(nowhere)


def describe(error: TramontaneError) -> str:
    """The error with everything that it carries and that its message does not say already."""
    parts = [str(error)]
    if isinstance(error, StatusError):
        parts += [
            f"{violation.field}: {violation.description}"
            for violation in error.violations
            if violation.description not in error.message
        ]
        if error.retry_after_s is not None:
            parts.append(f"try again in {error.retry_after_s:g} s")
        if isinstance(error, Unauthenticated):
            parts.append("--token-file names the file that holds yours")
    return "; ".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())
