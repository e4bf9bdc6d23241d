"""Numbers and sentences that the terminal's table and the page share, so that both say the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.result import ProcessShare, RunResult, SweepResult, TargetInfo

DASH = "-"
"""Stands where a figure is not known, or would rest on too few samples."""

Verdict: TypeAlias = tuple[Severity | None, str]
"""A sentence, and the worst that it means; None where all is well."""

_VERDICTS = {
    Severity.WRONG: "The server gave wrong answers",
    Severity.INVALID: "These figures cannot be trusted",
    Severity.MISSED: "An objective was not kept",
}


def number(value: float | None) -> str:
    """Three significant digits, no thousands separators: easy to read, and to parse.

    >>> [number(each) for each in (0.4567, 4.567, 45.67, 456.7, 45670.0, 0.0, None)]
    ['0.457', '4.57', '45.7', '457', '45670', '0', '-']
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def interval(low: float | None, high: float | None) -> str:
    """A confidence interval: `118-131`."""
    return DASH if low is None or high is None else f"{number(low)}-{number(high)}"


def percent(share: float | None) -> str:
    """A share of 1 as a percentage.

    >>> [percent(each) for each in (1.0, 0.9876, 0.0004, None)]
    ['100 %', '98.8 %', '0.04 %', '-']
    """
    return DASH if share is None else f"{share * 100:.3g} %"


def percentile(q: float) -> str:
    """A quantile's name.

    >>> [percentile(each) for each in (0.5, 0.99, 0.999)]
    ['p50', 'p99', 'p99.9']
    """
    return f"p{q * 100:g}"


def printable(text: str) -> str:
    """The text on one line, without what could steer a terminal: errors and names come from servers.

    >>> printable("refused\\n\\x1b[2Jgone")
    'refused \\ufffd[2Jgone'
    """
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text)


def stage_words(name: str) -> str:
    """A stage's name as its service gives it, in words.

    >>> stage_words("0.1"), stage_words("last")
    ('stage 1 of replica 0', 'stage last')
    """
    replica, dot, stage = name.partition(".")
    return f"stage {stage} of replica {replica}" if dot else f"stage {name}"


def process_words(process: ProcessShare) -> str:
    """Which part of the service a process plays."""
    return stage_words(process.name) if process.role == "stage" else f"{process.role} {process.name}"


def load_words(load: Load) -> str:
    """How requests came: `poisson, 8 requests/s, for 60 s, seed 1`."""
    words = [f"closed loop of {load.users} users" if load.kind == "closed" else load.kind]
    if load.rate is not None:
        words.append(f"{load.rate:.4g} requests/s")
    if load.burstiness is not None:
        words.append(f"burstiness {load.burstiness:g}")
    if load.detail:
        words.append(load.detail)
    return ", ".join([*words, f"for {load.duration_s:g} s", f"seed {load.seed}"])


def offered(load: Load) -> str:
    """The load in as few words as name a level of a sweep: `8 requests/s` or `16 users`."""
    return f"{load.users} users" if load.rate is None else f"{load.rate:.4g} requests/s"


def target_words(target: TargetInfo) -> str:
    """Whom the run talked to, and what it says of itself."""
    words = [f"{target.kind} {target.address}"]
    if target.version:
        words.append(f"version {target.version}")
    if target.dtype:
        words.append(target.dtype)
    if target.stages is not None:
        words.append(f"{target.stages} stage{'' if target.stages == 1 else 's'}")
    if target.context_tokens is not None:
        words.append(f"context of {target.context_tokens} tokens")
    return ", ".join(words)


def sweep_findings(sweep: SweepResult) -> list[Finding]:
    """Those of the whole, and those of all levels, each with its level.

    Notes of several levels that differ in numbers only are told once: `at 1 requests/s, and alike at 5 other levels:`.
    """
    alike: dict[str, list[tuple[RunResult, Finding]]] = {}
    for level in sweep.levels:
        for number, finding in enumerate(level.findings):
            told_once = finding.severity is Severity.NOTE
            key = re.sub(r"\d[\d.,]*", "#", finding.text) if told_once else f"{level.load.rate} {number}"
            alike.setdefault(key, []).append((level, finding))
    found = list(sweep.findings)
    for (level, finding), *others in alike.values():
        more = f", and alike at {len(others)} other level{'s' * (len(others) > 1)}" if others else ""
        found.append(replace(finding, text=f"at {offered(level.load)}{more}: {finding.text}"))
    return found


def verdict(result: RunResult) -> Verdict:
    """The run in one sentence, with the reason where it is a bad one."""
    if result.worst in _VERDICTS:
        return result.worst, _because(result.worst, result.findings)
    if not result.objectives:
        return None, "No objective was set, so there is no verdict."
    if any(kept.met is None for kept in result.objectives):
        return None, "No verdict: only an open loop shows whether an objective holds."
    return None, "Every objective was kept."


def sweep_verdict(sweep: SweepResult) -> Verdict:
    """The sweep in one sentence. A level above the best rate is meant to miss, and colours nothing."""
    findings = sweep_findings(sweep)
    if any(finding.severity is Severity.WRONG for finding in findings):
        return Severity.WRONG, _because(Severity.WRONG, findings)
    if not sweep.objectives:
        return None, "No objective was set, so there is no best rate."
    if sweep.best_rate is None:
        if any(finding.severity is Severity.INVALID for finding in sweep.findings):
            return Severity.INVALID, _because(Severity.INVALID, sweep.findings)
        return Severity.MISSED, "No level kept every objective."
    return None, f"Every objective held up to {sweep.best_rate:.4g} requests/s; {_beyond(sweep, sweep.best_rate)}."


def _because(worst: Severity, findings: Sequence[Finding]) -> str:
    """The verdict, and the first of the findings that it rests on."""
    first, *others = (finding.text for finding in findings if finding.severity is worst)
    more = f"; and {len(others)} more" if others else ""
    return f"{_VERDICTS[worst]}: {first}{more}."


def _beyond(sweep: SweepResult, best_rate: float) -> str:
    """What is known of rates above the best one."""
    if sweep.first_missed_rate is not None:
        at_it = next((level for level in sweep.levels if level.load.rate == sweep.first_missed_rate), None)
        piled_up = at_it is not None and all(kept.met for kept in at_it.objectives)
        what = "open requests piled up" if piled_up else "one was missed"
        return f"at {sweep.first_missed_rate:.4g} {what}"
    unknown = next((level for level in sweep.levels if (level.load.rate or 0.0) > best_rate), None)
    if unknown is None:
        return "the highest that was tried"
    why = next(
        (each.text for each in unknown.findings if each.severity is Severity.INVALID), "it did not run to its end"
    )
    return f"of {unknown.load.rate:.4g}, which was tried, nothing is known: {why}"
