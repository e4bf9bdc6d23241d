"""The options of `tramontane bench`, in groups that its verbs share, and what they mean to the code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import click

from tramontane.client.connecting import DEFAULT_TARGET
from tramontane.client.loadtest.generator import faults
from tramontane.client.loadtest.generator.observation import Generator
from tramontane.client.loadtest.generator.target import OPTIONAL, TargetOptions, is_http
from tramontane.client.loadtest.judging import objectives
from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, RandomIds, SyntheticText, read_text_file
from tramontane.client.loadtest.load.durations import parse_duration
from tramontane.client.loadtest.load.lengths import parse_lengths
from tramontane.client.loadtest.load.prompt_file import read_prompt_file
from tramontane.client.loadtest.load.workload import Workload

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False)
_SHARE = click.FloatRange(0, 1)


class Parsed(click.ParamType[T], Generic[T]):
    """A value read by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """What the function makes of it; its error becomes click's."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # a default that is what it should be
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DURATION = Parsed("time", parse_duration)
TIME = Parsed("time", partial(parse_duration, zero_allowed=True))
LENGTHS = Parsed("lengths", parse_lengths)
OBJECTIVE = Parsed("objective", objectives.parse_objective)
FAULT = Parsed("fault", faults.parse)


def _group(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


target_options = _group(
    click.option(
        "--target",
        envvar="TRAMONTANE_TARGET",
        show_envvar=True,
        default=DEFAULT_TARGET,
        show_default=True,
        help="Server: HOST:PORT and its like for gRPC, or http://HOST:PORT/v1 for any OpenAI-compatible one.",
    ),
    click.option("--model", help="Which model.  [default: the only one, or the first of an HTTP server]"),
    click.option("--tls", is_flag=True, help="Encrypt, and trust the usual authorities."),
    click.option("--ca", type=_FILE, help="Encrypt, and trust the authorities of this PEM file."),
    click.option("--cert", type=_FILE, help="Encrypt, with this client certificate (PEM)."),
    click.option("--key", type=_FILE, help="Its private key (PEM)."),
    click.option("--server-name", help="Encrypt, and ask for a certificate of this name, whatever the target's."),
    click.option(
        "--token-file",
        type=_FILE,
        envvar="TRAMONTANE_TOKEN_FILE",
        show_envvar=True,
        help="Holds a bearer token; for HTTP, the API key.",
    ),
    click.option("--clear-token", is_flag=True, help="Let the token travel without TLS beyond this machine."),
    click.option("--chat", is_flag=True, help="HTTP: use /chat/completions instead of /completions."),
    click.option(
        "--send",
        type=click.Choice(OPTIONAL),
        multiple=True,
        help="HTTP: send this field to any server; repeatable.  [default: to those that are known to take it]",
    ),
    click.option(
        "--connections", type=click.IntRange(1, 1024), default=1, show_default=True, help="gRPC connections a worker."
    ),
    click.option("--timeout", type=DURATION, default="300s", show_default=True, help="Deadline of each request."),
    click.option(
        "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that send and read."
    ),
    click.option(
        "--drain",
        type=TIME,
        default="60s",
        show_default=True,
        help="Requests may go on so long after the last arrival; then they are cut.",
    ),
)

characters_option = click.option(
    "--characters-per-token",
    type=click.FloatRange(0.1, 100),
    default=CHARACTERS_PER_TOKEN,
    show_default=True,
    help="Turns tokens into a text's length; a character outside ASCII is a token.",
)


def seed_option(decides: str) -> Callable[[Command], Command]:
    """What is drawn is drawn from it."""
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=decides)


workload_options = _group(
    click.option(
        "--prompt-tokens",
        type=LENGTHS,
        default="128",
        show_default=True,
        help="128, uniform:32-512 or lognormal:median=128,sigma=0.8,max=1024.",
    ),
    click.option("--output-tokens", type=LENGTHS, help="max_tokens, likewise.  [default: 128, or the prompts file's]"),
    click.option("--text", "text_file", type=_FILE, help="Prompts are slices of this text."),
    click.option("--prompts", "prompts_file", type=_FILE, help="Prompts of this jsonl, JSON array or CSV."),
    click.option(
        "--words", is_flag=True, help="Prompts are English words instead of random token ids; HTTP's default."
    ),
    characters_option,
    click.option("--prefixes", type=click.IntRange(0), default=0, help="Prompts share so many beginnings."),
    click.option("--prefix-tokens", type=click.IntRange(0), default=0, help="Length of each."),
    click.option("--distinct", type=click.IntRange(1), help="So many different requests, repeated.  [default: all]"),
    click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True),
    click.option("--top-k", type=click.IntRange(0)),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True)),
    click.option("--stop", multiple=True, help="Text that ends a completion; may be given several times."),
    click.option(
        "--ignore-eos/--heed-eos", default=None, help="Go on after EOS.  [default: yes where lengths are chosen]"
    ),
    click.option("--cancel", type=_SHARE, default=0.0, help="Share of requests whose client leaves early."),
    click.option("--slow", type=_SHARE, default=0.0, help="Share whose client pauses before each message."),
    click.option("--churn", type=_SHARE, default=0.0, help="Share with a connection of their own."),
    click.option("--bad", type=_SHARE, default=0.0, help="Share that the server must refuse."),
    click.option("--pause", type=TIME, default="500ms", show_default=True, help="Of slow readers."),
    seed_option(
        "Decides arrivals, lengths, prompts, conducts and requests' own seeds: the same seed is the same plan."
    ),
)

checking_options = _group(
    click.option("--fault", "faults", type=FAULT, multiple=True, metavar="FAULT", help=f"{faults.FORM}; repeatable."),
    click.option(
        "--alone", type=click.IntRange(0), default=16, show_default=True, help="Requests asked again alone, after."
    ),
    click.option(
        "--texts", type=click.IntRange(0), default=1000, show_default=True, help="Completions whose text is checked."
    ),
    click.option("--ceiling/--no-ceiling", default=True, help="Measure the generator itself before.  [default: yes]"),
)

output_options = _group(
    click.option("--out", type=click.Path(file_okay=False), help="Folder for result.json, requests and report.html."),
    click.option("--save-texts", is_flag=True, help="Keep prompts and completions in the requests' files."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of the table."),
    click.option("--quiet", is_flag=True, help="No progress on stderr."),
)


def objective_option(*defaults: str) -> Callable[[Command], Command]:
    """Promises to keep."""
    return click.option(
        "--objective",
        "objectives",
        type=OBJECTIVE,
        multiple=True,
        default=defaults,
        show_default=bool(defaults),
        help="Such as 'ttft:p95<1s' or 'itl:p95<100ms'; repeatable.",
    )


def generator_from(options: dict[str, Any]) -> Generator:
    """Who sends, and to whom."""
    return Generator(
        target=TargetOptions(
            address=options["target"],
            model=options["model"],
            connections=options["connections"],
            timeout_s=options["timeout"],
            tls=options["tls"],
            ca=options["ca"],
            cert=options["cert"],
            key=options["key"],
            server_name=options["server_name"],
            token_file=options["token_file"],
            clear_token=options["clear_token"],
            chat=options["chat"],
            # Only `--ignore-eos` itself asks for it; that it is on by default does not.
            send=(*options["send"], *("ignore_eos",) * bool(options.get("ignore_eos"))),
        ),
        workers=options["workers"],
        drain_s=options["drain"],
    )


def workload_from(options: dict[str, Any]) -> Workload:
    """What is asked.

    Raises:
        ValueError: options contradict each other or a file is not right.
        OSError: a file cannot be read.
    """
    return Workload(
        source=_source(options),
        prompt=options["prompt_tokens"],
        completion=options["output_tokens"],
        prefixes=options["prefixes"],
        prefix_tokens=options["prefix_tokens"],
        distinct=options["distinct"],
        temperature=options["temperature"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        stop=options["stop"],
        ignore_eos=options["ignore_eos"],
        misbehave={kind: options[kind] for kind in ("cancel", "slow", "churn", "bad") if options[kind]},
        pause_s=options["pause"],
    )


def _source(options: dict[str, Any]) -> Any:
    characters, text, prompts = options["characters_per_token"], options["text_file"], options["prompts_file"]
    if bool(text) + bool(prompts) + options["words"] > 1:
        raise ValueError("text, prompts and words are three sources of prompts; give one")
    if text:
        return read_text_file(Path(text), characters)
    if prompts:
        return read_prompt_file(Path(prompts), characters)
    words = options["words"] or is_http(options["target"])
    return SyntheticText(characters) if words else RandomIds()
