"""What of a file could not be used, by reason, with the place of the first: one odd entry does not refuse a file.

Reasons that differ in numbers only are one reason:

    3 entries of f.jsonl were passed over, the first in line 7: max_tokens is 0; it must lie in 1 .. 10,000,000
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_REASONS = 12
"""Told apart; what comes beyond them is counted together."""
_NUMBER = re.compile(r"-?\d[\d.,]*")


class Unusable(ValueError):  # noqa: N818  (what it is)
    """An entry that no request can be made of; the message says why."""


class Reason(NamedTuple):
    """Why some entries were passed over."""

    problem: str
    """Of the first of them."""
    line: int
    """Where it begins, from 1."""
    entries: int


@dataclass(frozen=True, slots=True)
class PassedOver:
    """All of a file's entries that were not used."""

    reasons: tuple[Reason, ...] = ()

    @property
    def count(self) -> int:
        """Entries of all reasons."""
        return sum(reason.entries for reason in self.reasons)

    def sentences(self, path: str) -> tuple[str, ...]:
        """One a reason, for the report."""
        name = Path(path).name
        return tuple(
            f"1 entry of {name} was passed over, line {line:,}: {problem}"
            if entries == 1
            else f"{entries:,} entries of {name} were passed over, the first in line {line:,}: {problem}"
            for problem, line, entries in self.reasons
        )


NOTHING = PassedOver()


class Tally:
    """Counts what is passed over while a file is read."""

    def __init__(self, before: PassedOver = PassedOver()) -> None:
        self._reasons = {_kind(reason.problem): reason for reason in before.reasons}

    def add(self, problem: str, line: int) -> None:
        """One more entry."""
        kind = _kind(problem)
        if kind not in self._reasons and len(self._reasons) >= MAX_REASONS:
            kind = ""
        first = self._reasons.get(kind, Reason(problem if kind else f"other reasons; {problem}", line, 0))
        self._reasons[kind] = first._replace(entries=first.entries + 1)

    @property
    def passed_over(self) -> PassedOver:
        """What was counted until now."""
        return PassedOver(tuple(self._reasons.values()))


def _kind(problem: str) -> str:
    return _NUMBER.sub("#", problem)
