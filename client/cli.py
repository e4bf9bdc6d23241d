"""The command line: `generate`, `models`, `health`, `version`, and the verbs that servers add (`command_group`)."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version as installed
from typing import Any

import click

from tramontane import __version__
from tramontane.client.arguments import Prompt
from tramontane.client.channel import GENERATE_TIMEOUT_S, SERVICE
from tramontane.client.client import Client, Stream
from tramontane.client.command_group import CommandGroup
from tramontane.client.connecting import connects, prints_json
from tramontane.client.errors import NotFound
from tramontane.client.types import Completion, Delta, HealthStatus, ModelInfo


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="tramontane %(version)s")
def main() -> None:
    """Serve Mistral and Mixtral language models from a cluster, and talk to the servers."""


def _parse_ids(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token ids such as 1,2,3") from None


@main.command()
@click.argument("prompt", required=False)
@connects
@click.option("--ids", callback=_parse_ids, help='Token ids instead of PROMPT, taken as they are: "1,2,3".')
@click.option("--model", help="Which model.  [default: the only one that is served]")
@click.option("--max-tokens", type=int, help="Tokens to generate at most.  [default: 256, or what the context leaves]")
@click.option("--min-tokens", type=int, help="Until so many tokens nothing ends the text.  [default: 0]")
@click.option("--temperature", type=float, help="0 takes the likeliest token each time.  [default: 1]")
@click.option("--top-k", type=int, help="Choose among the K likeliest tokens.  [default: 0, off]")
@click.option("--top-p", type=float, help="Choose among the likeliest that reach this sum.  [default: 1, all]")
@click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest.  [default: 0]")
@click.option(
    "--seed", type=int, help="Equal seeds give equal text in float32 on the CPU.  [default: a new one each time]"
)
@click.option("--stop", multiple=True, help="Text that ends the completion; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=GENERATE_TIMEOUT_S,
    show_default=True,
    help="Seconds, waiting for a server included.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print figures to stderr even where it is no terminal.")
@prints_json
def generate(
    client: Client,
    prompt: str | None,
    ids: list[int] | None,
    timeout: float,
    verbose: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Continue PROMPT and print the text as it comes.

    PROMPT - reads it from standard input, to the last newline. Of a model without a tokenizer, which gives no text, the
    token ids are printed: "1,2,3".
    """
    whole = _prompt(prompt, ids)
    begun = time.perf_counter()
    first_s: float | None = None
    try:
        stream = client.stream(whole, timeout_s=timeout, **arguments)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    with stream, _waiting_shown():
        for delta in stream:
            if first_s is None:
                first_s = time.perf_counter() - begun
            if not as_json:
                click.echo(_printed(stream, delta), nl=False)
    click.echo(json.dumps(asdict(stream.completion)) if as_json else "")
    if verbose or sys.stderr.isatty():
        click.secho(_figures(stream.completion, first_s or 0.0), err=True, dim=True)


@main.command()
@connects
@prints_json
def models(client: Client, as_json: bool) -> None:
    """List the models that the server offers."""
    found = client.models()
    if as_json:
        click.echo(json.dumps([asdict(info) for info in found]))
    else:
        _print_table(found)


@main.command()
@connects
@click.option("--model", help="Ask about one model instead of the whole server.")
@prints_json
def health(client: Client, model: str | None, as_json: bool) -> None:
    """Say whether the server serves; the exit status is 0 only when it does."""
    try:
        status = client.health("" if model is None else f"{SERVICE}/{model}")
    except NotFound:
        raise click.ClickException(f"{client.target} has no model {model!r}") from None
    if as_json:
        click.echo(json.dumps({"target": client.target, "model": model, "status": status}))
    else:
        click.secho(status, fg="green" if status is HealthStatus.SERVING else "yellow")
    if status is not HealthStatus.SERVING:
        raise click.exceptions.Exit(1)


@main.command()
@prints_json
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        versions = {"python": platform.python_version()} | {name: installed(name) for name in ("grpcio", "protobuf")}
        click.echo(json.dumps({"tramontane": __version__, **versions}))
    else:
        click.echo(f"tramontane {__version__}")


def _prompt(prompt: str | None, ids: list[int] | None) -> Prompt:
    if ids is not None:
        if prompt is not None:
            raise click.UsageError("give PROMPT or --ids, not both")
        return ids
    if prompt is None:
        raise click.UsageError("give PROMPT or --ids")
    try:
        return sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], error.start
        raise click.ClickException(
            f"standard input is no text in {error.encoding}: byte 0x{byte:02x} at place {place}"
        ) from None


def _printed(stream: Stream, delta: Delta) -> str:
    """The text of a delta, or its ids where the model has no text: `1,2` and then `,3`."""
    if not stream.ids_only:
        return delta.text
    ids = ",".join(map(str, delta.token_ids))
    return f",{ids}" if delta.offset and ids else ids


class _StderrHandler(logging.Handler):
    """Prints a line a record, for people."""

    def emit(self, record: logging.LogRecord) -> None:
        click.secho(record.getMessage(), err=True, dim=True)


@contextlib.contextmanager
def _waiting_shown() -> Iterator[None]:
    """A block in which stderr shows what calls wait for, as the client's logger tells it."""
    logger, handler = logging.getLogger("tramontane.client"), _StderrHandler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _figures(completion: Completion, first_s: float) -> str:
    usage, timings = completion.usage, completion.timings
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens", f"first after {first_s:.3f} s"]
    if timings.decode_ms > 0:
        parts.append(f"{(usage.completion_tokens - 1) / timings.decode_ms * 1000:.1f} tokens/s")
    return ", ".join([*parts, f"ended by {completion.finish_reason}", f"seed {completion.seed}"])


def _context(info: ModelInfo) -> str:
    lowered = info.context_tokens < info.checkpoint_context_tokens
    return f"{info.context_tokens} of {info.checkpoint_context_tokens}" if lowered else str(info.context_tokens)


def _print_table(found: tuple[ModelInfo, ...]) -> None:
    head = ("NAME", "SERVING", "CONTEXT", "WINDOW", "DTYPE", "WEIGHTS", "TOKENIZER", "STAGES", "VERSION")
    rows = [
        (
            info.name,
            "yes" if info.serving else "no",
            _context(info),
            str(info.window_tokens or "none"),
            info.dtype,
            info.quantization or info.dtype,
            "yes" if info.has_tokenizer else "none",
            str(info.stages),
            info.version[:12],
        )
        for info in found
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line, bold in [(head, True), *((row, False) for row in rows)]:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.secho(text.rstrip(), bold=bold)
    for info in found:
        if info.reason:
            click.secho(f"{info.name} is not serving: {info.reason}", err=True, fg="yellow")
