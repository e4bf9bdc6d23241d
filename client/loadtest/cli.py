"""`tramontane bench`: run, sweep, replay, soak, compare."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console

from tramontane.client.loadtest.judging.compare import compare as compare_runs
from tramontane.client.loadtest.load import schedule
from tramontane.client.loadtest.load.arrivals import parse_ramp, parse_steps
from tramontane.client.loadtest.load.recorded_times import Unit
from tramontane.client.loadtest.load.schedule import Schedule
from tramontane.client.loadtest.load.trace import read_trace
from tramontane.client.loadtest.load.workload import Workload, describe
from tramontane.client.loadtest.options import (
    DURATION,
    TIME,
    Parsed,
    characters_option,
    checking_options,
    generator_from,
    objective_option,
    output_options,
    seed_option,
    target_options,
    workload_from,
    workload_options,
)
from tramontane.client.loadtest.progress import Progress
from tramontane.client.loadtest.report.console import open_console, print_line
from tramontane.client.loadtest.report.json_report import RESULT, from_json, to_json
from tramontane.client.loadtest.report.output import save, save_sweep
from tramontane.client.loadtest.report.table import print_comparison, print_run, print_sweep
from tramontane.client.loadtest.report.wording import printable
from tramontane.client.loadtest.result import MEASURES, RunResult, SweepResult
from tramontane.client.loadtest.search import Search
from tramontane.client.loadtest.session import Run, Session, Wishes, open_session

T = TypeVar("T")
Result = TypeVar("Result", RunResult, SweepResult)

EPILOG = (
    "\b\nMeasures:\n"
    + "\n".join(f"  {name}: {words}" for name, words in MEASURES.items())
    + "\n\nExit status: 0; 1 wrong answers; 2 bad usage; 3 an objective was missed; 4 the figures cannot be trusted;"
    " 5 the run could not be carried out, or its result not saved."
)


class Unreached(click.ClickException):
    """The run could not be carried out."""

    exit_code = 5


@click.group()
def bench() -> None:
    """Push a server, and tell the truth about how it fared."""


@bench.command(epilog=EPILOG)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Arrivals a second: an open loop.")
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "constant", "gamma"]),
    default="poisson",
    show_default=True,
    help="How they are spaced.",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Of gamma: 1 is Poisson, less comes in bursts.",
)
@click.option("--steps", type=Parsed("steps", parse_steps), help="One rate after another: 2:10s,4:10s.")
@click.option("--ramp", type=Parsed("ramp", parse_ramp), help="A rate that grows or falls: 1-8.")
@click.option("--users", type=click.IntRange(1), help="A closed loop: each user waits for its answer. Hides overload.")
@click.option(
    "--duration", type=DURATION, default="30s", show_default=True, help="Of arrivals; --steps have their own."
)
@click.option(
    "--warmup", type=TIME, help="Sent at the start and not measured.  [default: 5s, or a fifth of a short run]"
)
@objective_option()
@target_options
@workload_options
@checking_options
@output_options
def run(**options: Any) -> None:
    """Load a server once, and report."""
    chosen = _understood(lambda: _schedule(options))
    workload = _understood(lambda: workload_from(options))

    _run_once(lambda session: _planned_run(session, chosen, workload), options, describe(workload))


@bench.command(epilog=EPILOG)
@click.option("--from", "lowest", type=float, default=1.0, show_default=True, help="First rate, requests a second.")
@click.option("--to", "highest", type=float, default=1024.0, show_default=True, help="Highest rate that is tried.")
@click.option("--tolerance", type=float, default=0.1, show_default=True, help="Of the rate that is found, as a share.")
@click.option("--duration", type=DURATION, default="30s", show_default=True, help="Of each level.")
@click.option("--warmup", type=TIME, help="Of each level.  [default: 5s, or a fifth of a short level]")
@objective_option("ttft:p95<1s", "itl:p95<100ms")
@target_options
@workload_options
@checking_options
@output_options
def sweep(**options: Any) -> None:
    """Find the highest rate at which the objectives hold, by bisection over Poisson arrivals."""
    limits = {name: options[name] for name in ("lowest", "highest", "tolerance")}
    search = _understood(lambda: Search(**limits))
    workload = _understood(lambda: workload_from(options))

    async def every_level(session: Session) -> tuple[SweepResult, list[Run]]:
        return await session.sweep(search, lambda rate: session.plan(_at_rate(rate, options), workload))

    folder = _folder(options)
    result, runs = _connected(every_level, options, describe(workload))
    _tell(result, print_sweep, options)
    if folder:
        _save(folder, lambda: save_sweep(folder, result, runs, texts=options["save_texts"]), options)
    sys.exit(result.exit_status)


@bench.command(epilog=EPILOG)
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--speed", type=float, default=1.0, show_default=True, help="2 sends it twice as fast.")
@click.option(
    "--timestamps",
    type=click.Choice(list(Unit)),
    default=Unit.AUTO,
    show_default=True,
    help="What a timestamp counts. Auto: ms, but s in tables and where most have fractions.",
)
@click.option("--warmup", type=TIME, default="0s", show_default=True, help="Sent at the start and not measured.")
@seed_option(
    "Decides what the trace leaves open: prompts that it gives by their length alone, and requests' own seeds."
)
@characters_option
@objective_option()
@target_options
@checking_options
@output_options
def replay(trace: Path, **options: Any) -> None:
    """Send a recorded TRACE again, its first arrival at the run's start.

    It is a jsonl of at_s, max_tokens and prompt or prompt_tokens, as the requests.jsonl of a run is, or has Mooncake's
    layout; or it is a table (CSV) as BurstGPT's and Azure's are.
    """
    speed, warmup_s, seed, characters = (options[name] for name in ("speed", "warmup", "seed", "characters_per_token"))
    recording = _understood(lambda: read_trace(trace, Unit(options["timestamps"]), characters))

    async def once(session: Session) -> Run:
        counts = await session.count(recording.texts_to_count(session.info.context_tokens))
        plan = schedule.replayed(recording, speed, warmup_s, seed, session.info, characters, counts)
        return await session.run(plan)

    _run_once(once, options, "as the trace says")


@bench.command(epilog=EPILOG)
@click.option("--rate", type=click.FloatRange(0, min_open=True), required=True, help="Arrivals a second (Poisson).")
@click.option("--duration", type=DURATION, default="1h", show_default=True, help="Ctrl-C ends it with its report.")
@click.option("--warmup", type=TIME, default="10s", show_default=True, help="Sent at the start and not measured.")
@objective_option()
@target_options
@workload_options
@checking_options
@output_options
def soak(**options: Any) -> None:
    """Load a server for a long time; say what drifted and what was left behind."""
    chosen = _understood(lambda: _at_rate(options["rate"], options))
    workload = _understood(lambda: workload_from(options))

    _run_once(lambda session: _planned_run(session, chosen, workload), options, describe(workload))


@bench.command()
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="A change below this share does not matter.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of the table.")
def compare(a: Path, b: Path, threshold: float, as_json: bool) -> None:
    """Say whether run B is better or worse than run A, and how certain that is.

    Each is a folder that --out has filled, or the result.json in it, of a run; a sweep's is not taken. Both must have
    been given the same load and workload, and have measured 5 s at least.

    Exit status: 0; 1 where any figure is worse by more than the threshold, with 95 % confidence in all of them
    together; 2 where the two cannot be compared.
    """
    comparison = _understood(lambda: compare_runs(_read_run(a), _read_run(b), threshold=threshold))
    if as_json:
        print_line(msgspec.json.encode(comparison))
    else:
        print_comparison(open_console(), comparison)
    sys.exit(comparison.exit_status)


async def _planned_run(session: Session, chosen: Schedule, workload: Workload) -> Run:
    return await session.run(await session.plan(chosen, workload))


def _schedule(options: dict[str, Any]) -> Schedule:
    """The one load that was asked for. Raises ValueError."""
    kinds = [kind for kind in ("rate", "steps", "ramp", "users") if options[kind] is not None]
    if len(kinds) != 1:
        raise ValueError(f"give one of --rate, --steps, --ramp and --users; given are {', '.join(kinds) or 'none'}")
    duration_s, seed = options["duration"], options["seed"]
    if options["steps"] is not None:
        duration_s = sum(seconds for _, seconds in options["steps"])
    warmup_s = _warmup_s(options["warmup"], duration_s)
    match kinds[0]:
        case "steps":
            return schedule.in_steps(options["steps"], warmup_s, seed)
        case "ramp":
            return schedule.as_ramp(options["ramp"], duration_s, warmup_s, seed)
        case "users":
            return schedule.closed(options["users"], duration_s, warmup_s, seed)
        case _:
            return _at_rate(options["rate"], options)


def _warmup_s(asked_s: float | None, duration_s: float) -> float:
    return min(5.0, duration_s / 5) if asked_s is None else asked_s


def _at_rate(rate: float, options: dict[str, Any]) -> Schedule:
    process, burstiness = options.get("arrivals", "poisson"), options.get("burstiness", 1.0)
    duration_s = options["duration"]
    times = duration_s, _warmup_s(options["warmup"], duration_s), options["seed"]
    return schedule.at_rate(rate, *times, process=process, burstiness=burstiness)


def _connected(job: Callable[[Session], Awaitable[T]], options: dict[str, Any], workload: str) -> T:
    """Run the job against the server. What keeps it from running is one line, and an exit status of its own."""
    wishes = Wishes(
        command=shlex.join(["tramontane", *sys.argv[1:]]),
        generator=generator_from(options),
        workload=workload,
        objectives=options["objectives"],
        faults=options["faults"],
        alone=options["alone"],
        texts=options["texts"],
        with_ceiling=options["ceiling"],
    )

    async def hold() -> T:
        async with open_session(wishes, Progress(quiet=options["quiet"])) as session:
            return await job(session)

    try:
        return asyncio.run(hold())
    except ConnectionError as error:
        raise Unreached(printable(str(error))) from None
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def _run_once(job: Callable[[Session], Awaitable[Run]], options: dict[str, Any], workload: str) -> None:
    """Carry one run out, print it, and only then save it: a full disk must not cost its figures."""
    folder = _folder(options)
    run = _connected(job, options, workload)
    _tell(run.result, print_run, options)
    if folder:
        _save(folder, lambda: save(folder, run, texts=options["save_texts"]), options)
    sys.exit(run.result.exit_status)


def _tell(result: Result, show: Callable[[Console, Result], None], options: dict[str, Any]) -> None:
    if options["as_json"]:
        print_line(to_json(result))
    else:
        show(open_console(), result)


def _folder(options: dict[str, Any]) -> Path | None:
    """Where to save, made before the run: what is wrong with it must not wait for the run's end."""
    if not options["out"]:
        return None
    folder = Path(options["out"])
    if (folder / RESULT).exists():
        raise click.UsageError(f"--out is {folder}, which holds a result already; give another folder")
    _understood(lambda: folder.mkdir(parents=True, exist_ok=True))
    return folder


def _save(folder: Path, save: Callable[[], Sequence[str]], options: dict[str, Any]) -> None:
    """Save, and say where; on stderr where stdout holds JSON alone."""
    try:
        files = save()
    except OSError as error:
        raise Unreached(f"the result is not saved: {error}") from None
    if options["as_json"]:
        Progress(quiet=options["quiet"]).say(f"saved in {folder}: {', '.join(files)}")
    else:
        open_console().print(f"Saved in {folder}: {', '.join(files)}", style="dim", markup=False, soft_wrap=True)


def _understood(read: Callable[[], T]) -> T:
    """A user's mistake is one line."""
    try:
        return read()
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def _read_run(path: Path) -> RunResult:
    result = from_json((path / RESULT if path.is_dir() else path).read_bytes())
    if not isinstance(result, RunResult):
        raise ValueError(f"{path} is a sweep; compare takes two runs")
    return result
