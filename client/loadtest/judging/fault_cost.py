"""What a fault cost the clients: errors, a stall and completed requests per second, from plain records.

A stage is stopped at 10 s, for 3 s:

    request 1   sent  9.9   tokens at 9.95, 13.02, 13.04   ended 13.04, OK
    request 2   sent 11.0                                  ended 12.00, RESOURCE_EXHAUSTED
    request 3   sent 12.5   tokens at 13.03, 13.05         ended 13.05, OK: recovered

    1 error; a stall of 3.02 s, from 10 s to 13.02 s
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from tramontane.client.loadtest.generator.faults import FaultOutcome
from tramontane.client.loadtest.plan import Conduct
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import FaultReport

QUIET_S = 1.0
"""The service has recovered when a request completes and none fails for so long."""


def reports(
    inflicted: Sequence[FaultOutcome], records: Sequence[Record], window_s: tuple[float, float]
) -> tuple[FaultReport, ...]:
    """What each fault cost until the next one, in the order of their times.

    The rate before a fault counts from the window's start, or from the recovery from the fault before.
    """
    records = [record for record in records if record.conduct is not Conduct.BAD]
    end_s = max([window_s[1], *(record.ended_s for record in records)])
    order = sorted(inflicted, key=lambda each: each.at_s)
    starts = [each.at_s for each in order if not each.error]
    since_s, found = window_s[0], []
    for each in order:
        if each.error:
            found.append(_not_done(each))
            continue
        until_s = next((start for start in starts if start > each.at_s), end_s)
        recovered_s = recovery(each, records, until_s)
        calm_s = until_s if recovered_s is None else recovered_s
        errors = [
            record
            for record in records
            if record.failed and each.at_s <= record.ended_s <= until_s and record.sent_s <= calm_s
        ]
        found.append(
            FaultReport(
                fault=str(each.fault),
                at_s=each.at_s,
                target=each.target,
                errors=len(errors),
                stall_s=longest_stall(records, each.at_s, calm_s, came_back=recovered_s is not None),
                completed_per_s_before=_completed_per_s(records, since_s, each.at_s),
                completed_per_s_after=_completed_per_s(records, calm_s, min(until_s, window_s[1])),
            )
        )
        since_s = each.at_s if recovered_s is None else recovered_s
    return tuple(found)


def recovery(inflicted: FaultOutcome, records: Sequence[Record], until_s: float) -> float | None:
    """When the first request that was sent after the fault completed, with none failing for QUIET_S after it.

    Not while the fault lasts: another replica may go on all the time.
    """
    failures = sorted(record.ended_s for record in records if record.failed)
    for done_s in sorted(
        record.ended_s
        for record in records
        if record.ok and record.sent_s >= inflicted.at_s and inflicted.over_s <= record.ended_s <= until_s
    ):
        place = bisect_left(failures, done_s)
        if place == len(failures) or failures[place] > min(done_s + QUIET_S, until_s):
            return done_s
    return None


def longest_stall(records: Sequence[Record], from_s: float, until_s: float, *, came_back: bool) -> float | None:
    """The longest time without a message although a request was open. None: from then on there was only silence.

    Unless the service came back, the silence after the last message counts too, as long as anyone still asked.
    """
    messages = sorted(t for record in records for t in record.message_times_s if from_s < t <= until_s)
    longest = 0.0
    for silence in sorted(pairwise([from_s, *messages]), key=lambda each: each[0] - each[1]):
        if silence[1] - silence[0] <= longest:
            break
        longest = max(longest, _unserved_s(records, *silence))
    if came_back:
        return longest
    last_s = min(until_s, max((record.ended_s for record in records), default=from_s))
    tail = _unserved_s(records, messages[-1] if messages else from_s, last_s)
    return None if tail > longest else longest


def _unserved_s(records: Sequence[Record], start_s: float, end_s: float) -> float:
    """How much of a silence somebody waited: all of it, or from the first request that was sent in it."""
    begun = [max(record.sent_s, start_s) for record in records if record.sent_s < end_s and record.ended_s > start_s]
    return end_s - min(begun, default=end_s)


def _completed_per_s(records: Sequence[Record], start_s: float, end_s: float) -> float | None:
    if end_s <= start_s:
        return None
    return sum(record.ok and start_s <= record.ended_s < end_s for record in records) / (end_s - start_s)


def _not_done(inflicted: FaultOutcome) -> FaultReport:
    return FaultReport(
        fault=str(inflicted.fault),
        at_s=inflicted.at_s,
        target=inflicted.target,
        errors=0,
        stall_s=None,
        completed_per_s_before=None,
        completed_per_s_after=None,
        error=inflicted.error,
    )
