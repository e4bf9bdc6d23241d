"""When are two answers to one request the same, and is a text what its ids print? Pure comparisons.

under load [5, 6, 7], alone [5, 6, 7]         as it should be
under load [5, 9, 7], alone [5, 6, 7]         differ from token 1: another request's keys were read, or rounding
under load [5, 6], left early, alone [5, 6, 7]   agree as far as the client listened
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tramontane.client.loadtest.generator.target import Answer
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import OK, PROTOCOL, Record

Asked: TypeAlias = tuple[Ask, Record]

EXAMPLES = 3
"""Sentences that are kept of each kind of mismatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Pairs of answers that should be the same."""

    checked: int
    wrong: int
    examples: tuple[str, ...] = ()


def agreement(compared: Iterable[tuple[str, Record | Answer, Record | Answer]]) -> Agreement:
    """Count the pairs that differ. Each comes with words that say which two they are."""
    places = [(words, first_difference(one, other)) for words, one, other in compared]
    wrong = [f"{words} differ from token {place}" for words, place in places if place is not None]
    return Agreement(checked=len(places), wrong=len(wrong), examples=tuple(wrong[:EXAMPLES]))


def repeats(asked: Sequence[Asked]) -> Agreement:
    """Requests of one run that share prompt, options and seed: each against the first that was answered in full."""
    groups: dict[Ask, list[Record]] = {}
    for ask, record in told(asked):
        groups.setdefault(identity(ask), []).append(record)
    full_first = (sorted(group, key=lambda record: record.status != OK) for group in groups.values())
    return agreement(
        (f"requests {first.number} and {other.number}, which are the same,", first, other)
        for first, *others in full_first
        for other in others
    )


def across_levels(levels: Mapping[str, tuple[Sequence[Ask], Sequence[Record]]]) -> Agreement:
    """A sweep's levels, by their names: each request as the first level that answered it got it, and as later ones did.

    Where a level asks one thing several times, its last answer stands for it; `repeats` compares them.
    """

    def compared() -> Iterator[tuple[str, Record, Record]]:
        firsts: dict[Ask, tuple[str, Record]] = {}
        for level, (asks, records) in levels.items():
            answers = {identity(ask): record for ask, record in told(pair(asks, records))}
            for same, record in answers.items():
                first_level, first = firsts.setdefault(same, (level, record))
                if first_level != level:
                    yield f"request {record.number} at {first_level} and at {level}", first, record

    return agreement(compared())


def first_difference(one: Record | Answer, other: Record | Answer) -> int | None:
    """The first place where two answers to one request differ. One that broke off may be the shorter."""
    for place, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if a != b:
            return place
    shorter, longer = sorted((one, other), key=lambda answer: len(answer.token_ids))
    length = len(shorter.token_ids)
    return length if length < len(longer.token_ids) and shorter.status == OK else None


def identity(ask: Ask) -> Ask:
    """All that decides a request's tokens, as a key. A greedy one ignores its filters and its seed."""
    plain = replace(ask, number=0, conduct=Conduct.NORMAL, cancel_after=0, pause_s=0.0)
    return plain if ask.temperature else replace(plain, seed=0, top_k=None, top_p=None)


def pair(asks: Iterable[Ask], records: Iterable[Record]) -> list[Asked]:
    """Each record with its ask. A closed loop may have asked it more than once."""
    by_number = {ask.number: ask for ask in asks}
    return [(by_number[record.number], record) for record in records]


def told(asked: Iterable[Asked]) -> list[Asked]:
    """Those whose tokens are known, as far as they came. Over HTTP that is none."""
    return [(ask, record) for ask, record in asked if record.token_ids and record.status != PROTOCOL]


def wrong_text(ask: Ask, record: Record, printed: str) -> str | None:
    """A sentence where a completion's text is not what its ids print, up to the first stop string."""
    due = up_to_stop(printed, ask.stop)
    if record.text == due:
        return None
    same = zip(record.text, due, strict=False)
    place = next((n for n, (a, b) in enumerate(same) if a != b), min(len(record.text), len(due)))
    near = slice(place, place + 16)
    return f"request {ask.number} said {record.text[near]!r} at character {place}, and its ids print {due[near]!r}"


def up_to_stop(printed: str, stop: Iterable[str]) -> str:
    """The text before the first stop string to be complete; of those that end together, before the longest.

    >>> up_to_stop("one END of it", ["of", "END", "e END"])
    'on'
    """
    ends = [(place + len(string), place) for string in stop if (place := printed.find(string)) >= 0]
    return printed[: min(ends)[1]] if ends else printed
