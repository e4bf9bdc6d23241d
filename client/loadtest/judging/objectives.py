"""Objectives such as TTFT p95 < 1 s: read from the command line, judged for each request and for a whole run.

A request that was refused, that failed or was cut, and an answer without a single token, met nothing and counts as
infinitely late. Leaving such requests out would let a server look the better the more it refuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from tramontane.client.loadtest.judging.latency import values_ms
from tramontane.client.loadtest.judging.quantiles import quantile
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import MEASURES, Objective, ObjectiveResult

_SYNTAX = re.compile(r"(?P<measure>\w+):p(?P<percent>\d+(\.\d+)?)<(?P<limit>\d+(\.\d+)?)(?P<unit>ms|s)")


def parse_objective(text: str) -> Objective:
    """Read MEASURE:pQUANTILE<LIMIT.

    >>> print(parse_objective("ttft:p95<1s"))
    ttft p95 < 1000 ms

    Raises:
        ValueError: it is not of this form; the message says what is.
    """
    found = _SYNTAX.fullmatch(re.sub(r"\s", "", text).lower())
    if found is None:
        raise ValueError(f"an objective is MEASURE:pQUANTILE<LIMIT with ms or s, such as ttft:p95<1s; not {text!r}")
    if found["measure"] not in MEASURES:
        raise ValueError(f"an objective's measure is one of {', '.join(MEASURES)}; not {found['measure']!r}")
    percent, limit = float(found["percent"]), float(found["limit"])
    if not 0 < percent < 100:
        raise ValueError(f"an objective's quantile is above p0 and below p100; not p{found['percent']}")
    if limit == 0:
        raise ValueError(f"an objective's limit is above 0; not {found['limit']}{found['unit']}")
    return Objective(
        measure=found["measure"], q=round(percent / 100, 9), limit_ms=limit * (1000 if found["unit"] == "s" else 1)
    )


def answered(record: Record) -> bool:
    """It was answered in full, with at least one token."""
    return record.ok and bool(record.message_times_s)


def met(record: Record, objective: Objective) -> bool:
    """Whether this request alone kept the objective.

    Of its gaps (ITL) the quantile is taken: with itl p95 < 100 ms, one gap in twenty may be longer. Where the measure
    is undefined, as TPOT of a single token, there was nothing to break.
    """
    if not answered(record):
        return False
    values = values_ms(record, objective.measure)
    return not values or quantile(values, objective.q) < objective.limit_ms


def met_all(record: Record, objectives: Sequence[Objective]) -> bool:
    """Whether this request kept every objective: the requests that goodput counts."""
    return all(met(record, objective) for objective in objectives)


def verdicts(
    records: Sequence[Record], objectives: Sequence[Objective], *, is_open: bool
) -> tuple[ObjectiveResult, ...]:
    """Whether the run kept its objectives. A closed loop gets values but no verdict: it slows down with the server."""
    return tuple(_verdict(records, objective, is_open=is_open) for objective in objectives)


def _verdict(records: Sequence[Record], objective: Objective, *, is_open: bool) -> ObjectiveResult:
    """One objective over all requests.

    Of 100 requests 96 took 0.2 s and 4 failed: TTFT p95 is 0.2 s, p99 infinite. A failed request counts as one sample,
    or for gaps as many as the others have on average.
    """
    found = [values for record in records if answered(record) if (values := values_ms(record, objective.measure))]
    samples = [value for values in found for value in values]
    failed = sum(not answered(record) for record in records)
    samples += [math.inf] * failed * max(1, round(len(samples) / max(1, len(found))))
    if not samples:
        return ObjectiveResult(objective=objective, value_ms=None, met=None)
    value = quantile(np.array(samples), objective.q)
    return ObjectiveResult(
        objective=objective,
        value_ms=value if math.isfinite(value) else None,
        met=value < objective.limit_ms if is_open else None,
    )
