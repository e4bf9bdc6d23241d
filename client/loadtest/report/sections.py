"""A result as tables of words: what the terminal prints and the page shows, cell for cell.

A section without anything to say is left out; a figure that is not known is a dash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tramontane.client.loadtest.report.wording import (
    DASH,
    interval,
    load_words,
    number,
    percent,
    percentile,
    process_words,
    stage_words,
    target_words,
)
from tramontane.client.loadtest.result import (
    MEASURES,
    QUANTILES,
    Breakdown,
    Checks,
    Distribution,
    FaultReport,
    GeneratorLag,
    ObjectiveResult,
    RunResult,
    ServerView,
)

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One small table. The first column names the row."""

    title: str
    columns: Row = ()
    """Heads of all columns but the first, whose cells are figures; without any, cells are words."""
    rows: tuple[Row, ...]
    note: str = ""


def run_sections(result: RunResult) -> Iterator[Section]:
    """Everything that a run found, in reading order; `about` comes before."""
    yield _requests(result)
    yield from failures([result])
    yield latency(result.latencies)
    if result.refusals is not None:
        yield _refusals(result.refusals)
    yield _throughput(result)
    if result.objectives:
        yield _objectives(result.objectives)
    if result.breakdown is not None:
        yield breakdown(result.breakdown)
    yield from _generator(result)
    if result.server is not None:
        yield from _server(result.server)
    if result.checks is not None:
        yield _checks(result.checks)
    if result.faults:
        yield _faults(result.faults)
    if result.stalls:
        rows = tuple((f"{stall.start_s:.2f} s", number(stall.end_s - stall.start_s)) for stall in result.stalls)
        yield Section(title="Stalls: requests were open and not one message came", columns=("lasted s",), rows=rows)


def about(result: RunResult) -> Section:
    """What was run, on what."""
    start, end = result.window_s
    machine = result.machine
    rows: tuple[Row, ...] = (
        ("model", result.target.model),
        ("target", target_words(result.target)),
        ("load", load_words(result.load)),
        ("workload", result.workload),
        ("measured", f"from {start:g} s to {end:g} s: {end - start:g} s"),
        ("generator", f"{result.workers} worker{'' if result.workers == 1 else 's'} of {result.tool}"),
        (
            "machine",
            f"{machine.processor}, {machine.cores} cores, {number(machine.memory_gib)} GiB, {machine.system}",
        ),
        ("date", result.date),
        ("command", result.command),
    )
    return Section(title="Run", rows=rows)


def latency(latencies: dict[str, Distribution]) -> Section:
    """A row per measure and, below it, the interval that holds each quantile with 95 % confidence."""
    rows: list[Row] = []
    for measure in MEASURES:
        if measure in latencies:
            rows += _quantile_rows(measure, latencies[measure])
    note = "Below each quantile, where there is room, its 95 % confidence interval. "
    note += "One with fewer than 10 samples beyond it is left out."
    return Section(title="Latency, ms", columns=_QUANTILE_HEADS, rows=tuple(rows), note=note)


INTERVAL_ROW = ""
"""The first cell of a row of confidence intervals, so that it can be shown smaller."""
_QUANTILE_HEADS: Row = ("samples", "mean", *map(percentile, QUANTILES))


def _quantile_rows(name: str, found: Distribution) -> list[Row]:
    each_q = [found.quantile(q) for q in QUANTILES]
    values = [DASH if each is None else number(each.value) for each in each_q]
    intervals = ["" if each is None else interval(each.low, each.high) for each in each_q]
    return [(name, str(found.count), number(found.mean), *values), (INTERVAL_ROW, "", "", *intervals)]


def _requests(result: RunResult) -> Section:
    counts = result.counts

    def row(name: str, count: int) -> Row:
        return name, str(count), percent(count / counts.sent if counts.sent else None)

    ends = sorted(counts.by_status.items(), key=lambda item: -item[1])
    rows = [row("sent", counts.sent), row("completed", counts.completed), row("failed", counts.failed)]
    rows += [row("refused, among the failed", counts.refused), row("cut", counts.cut)]
    rows += [row(f"ended {status}", count) for status, count in ends]
    return Section(title="Requests of the measured window", columns=("count", "share"), rows=tuple(rows))


def failures(results: Sequence[RunResult]) -> Iterator[Section]:
    """Why requests of these runs failed: a line a status."""
    counts: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for result in results:
        counts.update(result.counts.by_status)
        messages = result.counts.first_errors | messages
    if messages:
        rows = tuple((status, str(counts[status]), message) for status, message in messages.items())
        yield Section(title="Why requests failed: of each status the first message", rows=rows)


def _refusals(found: Distribution) -> Section:
    note = f"From sending to the status. The slowest took {number(found.maximum)} ms."
    rows = tuple(_quantile_rows("refusal", found))
    return Section(title="Refusals, ms", columns=_QUANTILE_HEADS, rows=rows, note=note)


def _throughput(result: RunResult) -> Section:
    rates = result.throughput
    rows: list[Row] = [
        ("requests/s completed", number(rates.requests_per_s)),
        ("requests/s that met every objective (goodput)", number(rates.goodput_per_s)),
        ("share of all requests that did", percent(rates.goodput_share)),
        ("input tokens/s", number(rates.input_tokens_per_s)),
        ("output tokens/s", number(rates.output_tokens_per_s)),
        ("output tokens per message", number(rates.tokens_per_message)),
    ]
    steady = _STEADY[result.stationary]
    return Section(title="Throughput", columns=("value",), rows=tuple(rows), note=f"Over the window: {steady}.")


_STEADY = {True: "stationary", False: "not stationary", None: "whether it was steady cannot be told"}


def _objectives(objectives: tuple[ObjectiveResult, ...]) -> Section:
    verdicts = {True: "kept", False: "MISSED", None: "no verdict"}
    rows = tuple((str(kept.objective), number(kept.value_ms), verdicts[kept.met]) for kept in objectives)
    note = "Over all requests of the window: one that failed or was cut is infinitely late."
    return Section(title="Objectives", columns=("measured ms", "verdict"), rows=rows, note=note)


BREAKDOWN_PARTS = (
    ("client lag", "client_lag_ms"),
    ("queue", "queue_ms"),
    ("prefill", "prefill_ms"),
    ("decode", "decode_ms"),
    ("network and the rest", "network_ms"),
)
"""Parts of a request's time in the order in which they pass, with their fields in `Breakdown`."""


def breakdown(parts: Breakdown) -> Section:
    """Where a completed request's time went."""
    values = [(name, float(getattr(parts, field))) for name, field in BREAKDOWN_PARTS]
    whole = sum(value for _, value in values)
    rows = [(name, number(value), percent(value / whole if whole else None)) for name, value in values]
    rows.append(("end to end", number(whole), ""))
    return Section(
        title="Where a completed request's time went, on the mean", columns=("ms", "share"), rows=tuple(rows)
    )


def _generator(result: RunResult) -> Iterator[Section]:
    lag: GeneratorLag = result.lag
    rows: list[Row] = []
    for name, found in (("sending", lag.send), ("reading", lag.read)):
        if found is not None:
            rows += _quantile_rows(name, found)
    if rows:
        yield Section(title="Generator's own lag, ms", columns=_QUANTILE_HEADS, rows=tuple(rows))
    figures: list[Row] = [("CPU cores it used", number(result.generator_cores))]
    if result.ceiling is not None:
        rates, ceiling = result.throughput, result.ceiling
        messages_per_s = rates.output_tokens_per_s / (rates.tokens_per_message or 1.0)
        share = percent(messages_per_s / ceiling.messages_per_s) if ceiling.messages_per_s else DASH
        figures += [
            ("its ceiling is at least, requests/s", number(ceiling.requests_per_s)),
            ("its ceiling is at least, messages/s", number(ceiling.messages_per_s)),
            ("messages/s of this run, of that ceiling", share),
        ]
    yield Section(title="Generator", columns=("value",), rows=tuple(figures))


def _server(server: ServerView) -> Iterator[Section]:
    rows: list[Row] = [(f"{stage_words(name)} busy", percent(busy)) for name, busy in server.stage_busy.items()]
    rows += [
        ("rows per microbatch", number(server.rows_per_microbatch)),
        ("microbatches", str(server.microbatches)),
        ("preemptions", str(server.preemptions)),
    ]
    note = (
        f"The server's counters, subtracted over {number(server.seconds)} s. Busy is the time inside a stage's steps."
    )
    yield Section(title="Server", columns=("value",), rows=tuple(rows), note=note)
    if server.processes:
        shares = tuple((process_words(p), number(p.cpu_s), number(p.cores)) for p in server.processes)
        yield Section(title="CPU by process", columns=("CPU s", "cores"), rows=shares)


def _checks(checks: Checks) -> Section:
    rows: tuple[Row, ...] = (
        ("streams that contradict themselves", DASH, str(checks.offsets_wrong)),
        ("texts against their ids", str(checks.texts_checked), str(checks.texts_wrong)),
        ("tokens against the same request alone", str(checks.alone_checked), str(checks.alone_wrong)),
        ("tokens against a repeat of the run", str(checks.repeats_checked), str(checks.repeats_wrong)),
        ("bad requests accepted", DASH, str(checks.bad_accepted)),
    )
    note = "The model promises the same tokens in any company." if checks.must_match else ""
    if not checks.must_match:
        note = "The model does not promise the same tokens in any company: other tokens may be rounding."
    return Section(title="Checks", columns=("checked", "wrong"), rows=rows, note=" ".join((note, *checks.examples)))


def _faults(faults: tuple[FaultReport, ...]) -> Section:
    def row(fault: FaultReport) -> Row:
        if fault.error:
            return f"{fault.fault}: not done, {fault.error}", f"{fault.at_s:.1f}", DASH, DASH, DASH, DASH
        stall = "no end" if fault.stall_s is None else number(fault.stall_s)
        rates = number(fault.completed_per_s_before), number(fault.completed_per_s_after)
        return f"{fault.fault} on {fault.target}", f"{fault.at_s:.1f}", str(fault.errors), stall, *rates

    heads = ("at s", "failed", "stall s", "completed/s before", "after")
    return Section(title="Faults", columns=heads, rows=tuple(map(row, faults)))
