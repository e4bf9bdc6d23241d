"""Results in the terminal: aligned, without boxes, so that a pipe reads what a person reads.

Colours, and widths beyond 120 columns, never carry meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tramontane.client.loadtest.finding import Finding, Severity, worst_first
from tramontane.client.loadtest.report.sections import INTERVAL_ROW, Section, about, failures, run_sections
from tramontane.client.loadtest.report.side_by_side import about_sweep, changes, levels
from tramontane.client.loadtest.report.wording import (
    Verdict,
    printable,
    sweep_findings,
    sweep_verdict,
    verdict,
)
from tramontane.client.loadtest.result import RunResult, SweepResult

if TYPE_CHECKING:
    from tramontane.client.loadtest.judging.compare import Comparison

_STYLES = {
    Severity.WRONG: "bold white on red",
    Severity.INVALID: "bold white on magenta",
    Severity.MISSED: "bold black on yellow",
    Severity.NOTE: "bold cyan",
}
_CELL_STYLES = {"MISSED": "bold red", "kept": "green", "worse": "bold red", "better": "green"}


def print_run(console: Console, result: RunResult) -> None:
    """A whole run; the verdict comes last, where the eye is when all has scrolled by."""
    print_section(console, about(result))
    _print_findings(console, result.findings)
    for section in run_sections(result):
        print_section(console, section)
    _print_verdict(console, verdict(result))


def print_sweep(console: Console, sweep: SweepResult) -> None:
    """The levels side by side, with what every level has in common on top."""
    if sweep.levels:
        print_section(console, about_sweep(sweep))
    _print_findings(console, sweep_findings(sweep))
    print_section(console, levels(sweep.levels))
    for section in failures(sweep.levels):
        print_section(console, section)
    _print_verdict(console, sweep_verdict(sweep))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """What changed from A to B, and what makes that doubtful."""
    _print_findings(console, [Finding(severity=Severity.NOTE, text=text) for text in comparison.warnings])
    print_section(console, changes(comparison))
    worse = [each.name for each in comparison.changes if each.verdict == "worse"]
    said = f"B is worse: {', '.join(worse)}." if worse else "Nothing is shown to be worse in B."
    _print_verdict(console, (Severity.MISSED if worse else None, said))


def print_section(console: Console, section: Section) -> None:
    """One section under its title. Texts may come from a server: no markup is read in them."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(overflow="fold")
    for _ in range(max(map(len, section.rows), default=1) - 1):
        table.add_column(justify="right" if section.columns else "left", overflow="fold")
    if section.columns:
        table.add_row("", *(Text(head, style="dim") for head in section.columns))
    for row in section.rows:
        if row[0] == INTERVAL_ROW and _too_narrow(console, section):
            continue
        base = "dim" if row[0] == INTERVAL_ROW else ""
        table.add_row(*(Text(printable(cell), style=_CELL_STYLES.get(cell, base)) for cell in row))
    console.print(Text(section.title, style="bold"))
    console.print(Padding.indent(table, 2))
    if section.note:
        console.print(Padding.indent(Text(printable(section.note), style="dim"), 2))
    console.print()


def _too_narrow(console: Console, section: Section) -> bool:
    """Whether confidence intervals would be folded; values go before them."""
    widths = [max(map(len, cells)) for cells in zip(*section.rows, strict=False)]
    return 2 + sum(widths) + 2 * (len(widths) - 1) > console.width


def _print_findings(console: Console, findings: Sequence[Finding]) -> None:
    for finding in worst_first(findings):
        label = Text(f" {finding.severity.upper()} ", style=_STYLES[finding.severity])
        console.print(Text.assemble(label, " ", printable(finding.text)))
    if findings:
        console.print()


def _print_verdict(console: Console, said: Verdict) -> None:
    severity, sentence = said
    console.print(Text(printable(sentence), style="bold green" if severity is None else _STYLES[severity]))
