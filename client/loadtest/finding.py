"""The sentences that a reader must not miss, and what each means for the run and its exit status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """What a finding means for the run. Sorted from worst."""

    WRONG = "wrong"
    """The server gave wrong answers. Exit status 1."""
    INVALID = "invalid"
    """The figures cannot be trusted. Exit status 4."""
    MISSED = "missed"
    """An objective was not kept. Exit status 3."""
    NOTE = "note"
    """The reader should know."""


EXIT_STATUSES = {Severity.WRONG: 1, Severity.INVALID: 4, Severity.MISSED: 3, Severity.NOTE: 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sentence that the reader must not miss."""

    severity: Severity
    text: str


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings in the order in which they must be read."""
    return tuple(sorted(findings, key=lambda finding: list(Severity).index(finding.severity)))
