"""From what was seen to what is reported: pure, so that a report can be made again from the same observation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tramontane import __version__
from tramontane.client.loadtest.finding import Finding, Severity, worst_first
from tramontane.client.loadtest.generator.observation import Generator, Observation
from tramontane.client.loadtest.judging.checks import findings_of_checks
from tramontane.client.loadtest.judging.drift import drift_findings, leftovers
from tramontane.client.loadtest.judging.fault_cost import reports
from tramontane.client.loadtest.judging.findings import findings_of_figures
from tramontane.client.loadtest.judging.measures import measure
from tramontane.client.loadtest.judging.quantiles import distribution
from tramontane.client.loadtest.judging.server_view import shared_machine, view
from tramontane.client.loadtest.judging.stationarity import stationary
from tramontane.client.loadtest.judging.timeline import seconds, stalls
from tramontane.client.loadtest.plan import Plan
from tramontane.client.loadtest.record import CUT
from tramontane.client.loadtest.result import (
    Ceiling,
    Checks,
    GeneratorLag,
    Machine,
    Objective,
    RunResult,
    ServerView,
    TargetInfo,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What stays the same over the runs of one command."""

    command: str
    target: TargetInfo
    workload: str
    objectives: tuple[Objective, ...]
    ceiling: Ceiling | None
    machine: Machine
    generator: Generator


def assess(plan: Plan, seen: Observation, setting: Setting, checks: Checks | None) -> RunResult:
    """The whole result of one run."""
    load = replace(plan.load, duration_s=seen.until_s) if seen.stopped else plan.load
    window_s = (min(load.warmup_s, seen.until_s), seen.until_s)
    # What its user cut is no fault of the server's.
    records = [record for record in seen.records if not (seen.stopped and record.status == CUT)]
    measured = measure(records, load, window_s, setting.objectives)
    lag = GeneratorLag(
        send=measured.send_lag,
        read=distribution([late_s * 1000 for at_s, late_s in seen.usage.read_lag if window_s[0] <= at_s < window_s[1]]),
    )
    is_stationary = stationary(records, load, window_s)
    silences = stalls(records, window_s)
    cores = seen.usage.cores + _own_cores(seen)
    return RunResult(
        date=seen.date,
        tool=f"tramontane bench {__version__}",
        command=setting.command,
        target=setting.target,
        machine=setting.machine,
        workers=setting.generator.workers,
        load=load,
        workload=setting.workload,
        window_s=window_s,
        counts=measured.counts,
        latencies=measured.latencies,
        throughput=measured.throughput,
        objectives=measured.objectives,
        breakdown=measured.breakdown,
        lag=lag,
        generator_cores=cores,
        server=_server(seen),
        checks=checks,
        stationary=is_stationary,
        stalls=silences,
        faults=reports(seen.faults, records, window_s),
        ceiling=setting.ceiling,
        findings=worst_first(
            [
                *(findings_of_checks(checks) if checks else ()),
                *findings_of_figures(measured, load, lag, is_stationary, silences),
                *shared_machine(cores, setting.machine.cores),
                *_on_the_target(setting.target),
                *_on_the_run(seen, plan, window_s),
            ]
        ),
        timeline=seconds(seen.records, seen.until_s),
        samples=measured.samples,
        refusals=measured.refusals,
    )


def _own_cores(seen: Observation) -> float:
    elapsed_s = seen.after.at_s - seen.before.at_s
    return (seen.after.own_cpu_s - seen.before.own_cpu_s) / elapsed_s if elapsed_s > 0 else 0.0


def _server(seen: Observation) -> ServerView | None:
    elapsed_s = seen.after.at_s - seen.before.at_s
    if seen.before.stats is None or seen.after.stats is None or elapsed_s <= 0:
        return None
    return view(seen.before.stats, seen.after.stats, elapsed_s)


def _on_the_target(target: TargetInfo) -> Iterator[Finding]:
    if target.unsent:
        text = f"{', '.join(target.unsent)} were not sent, as this server is not known to take them; --send sends them"
        yield Finding(severity=Severity.NOTE, text=text)


def _on_the_run(seen: Observation, plan: Plan, window_s: tuple[float, float]) -> Iterator[Finding]:
    yield from (Finding(severity=Severity.NOTE, text=note) for note in plan.notes)
    yield from drift_findings(seen.records, window_s)
    yield from leftovers(seen.at_rest)
    if seen.stopped:
        cut = sum(record.status == CUT for record in seen.records)
        text = f"stopped by its user after {seen.until_s:.1f} of {plan.load.duration_s:g} s"
        text += f"; {cut} requests that were open are left out" if cut else ""
        yield Finding(severity=Severity.NOTE, text=text)
        if window_s[0] >= window_s[1]:
            yield Finding(severity=Severity.INVALID, text="it was stopped in its warm-up: nothing was measured")
    for outcome in seen.faults:
        if outcome.error:
            yield Finding(severity=Severity.INVALID, text=f"fault {outcome.fault} was not done: {outcome.error}")
    if seen.usage.dead_workers:
        text = f"{seen.usage.dead_workers} workers died; what was open at them is not in the figures"
        yield Finding(severity=Severity.INVALID, text=text)
    elif plan.load.is_open and not seen.stopped and len(seen.records) != len(plan.asks):
        text = f"of {len(plan.asks)} planned requests {len(seen.records)} were told of: a fault of the generator"
        yield Finding(severity=Severity.INVALID, text=text)
