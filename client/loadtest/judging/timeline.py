"""The run second by second, and its silences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tramontane.client.loadtest.judging.latency import tokens_by_message, values_ms
from tramontane.client.loadtest.plan import Conduct
from tramontane.client.loadtest.record import CUT, LEFT, Record
from tramontane.client.loadtest.result import Second, Stall

READERS = (Conduct.NORMAL, Conduct.CHURN, Conduct.CANCEL)
"""Clients that read as fast as they can: while one waits, the silence is not its own."""

LEAST_STALL_S = 1.0
TIMES_MEDIAN_ITL = 20
TIMES_MEDIAN_TTFT = 5


def seconds(records: Sequence[Record], until_s: float) -> tuple[Second, ...]:
    """What happened in each second from 0 to `until_s`, rounded up. Those that were cut when the run stopped waiting
    stand beside those that failed.
    """
    length = max(math.ceil(until_s), 0)
    messages = [
        (time_s, count)
        for record in records
        for time_s, count in zip(record.message_times_s, tokens_by_message(record), strict=True)
    ]
    lost = [each for each in records if each.failed or (each.status == CUT and each.conduct is not Conduct.BAD)]
    arrived = _by_second((record.intended_s for record in records), length)
    ended = _by_second((record.ended_s for record in records), length)
    failures = _by_second((record.ended_s for record in lost), length)
    output = _by_second((time_s for time_s, _ in messages), length, [count for _, count in messages])
    under_way = np.cumsum(arrived - ended)
    firsts: list[list[float]] = [[] for _ in range(length)]
    for record in records:
        if record.conduct in READERS and record.message_times_s and record.message_times_s[0] < length:
            firsts[int(record.message_times_s[0])].extend(values_ms(record, "ttft"))
    return tuple(
        Second(
            at_s=at_s,
            arrived=int(arrived[at_s]),
            ended=int(ended[at_s]),
            failed=int(failures[at_s]),
            open=int(under_way[at_s]),
            output_tokens=int(output[at_s]),
            ttft_ms=median(firsts[at_s]) if firsts[at_s] else None,
        )
        for at_s in range(length)
    )


def stalls(records: Sequence[Record], window_s: tuple[float, float]) -> tuple[Stall, ...]:
    """Silences that touch the window: requests were open, and for too long not one of the run's messages came.

    Too long while someone waits for its next message is 1 s, or 20 median gaps if that is more: a decoding server
    speaks all the time. While all wait for their first, it may be a long prefill, so it has to last 5 median TTFTs too.
    With gaps of 20 ms and TTFTs of 0.4 s: 1 s in mid-stream, 2 s before first messages.

    A request that ends well ends a silence, one that fails or is cut does not: a server that falls silent at 10 s and
    resets its connections at 14 s stalled for 4 s.
    """
    readers = [record for record in records if record.conduct in READERS]
    gaps_ms = [gap for record in readers for gap in values_ms(record, "itl")]
    ttfts_ms = [value for record in readers for value in values_ms(record, "ttft")]
    streaming_s = max(LEAST_STALL_S, TIMES_MEDIAN_ITL * median(gaps_ms or [0.0]) / 1000)
    waiting_s = max(streaming_s, TIMES_MEDIAN_TTFT * median(ttfts_ms or [0.0]) / 1000)
    return tuple(
        Stall(start_s=start_s, end_s=end_s)
        for start_s, end_s in _silences(records, readers, streaming_s)
        if start_s < window_s[1] and end_s > window_s[0]
        if end_s - start_s > waiting_s or _mid_stream(readers, start_s, start_s + streaming_s)
    )


def _by_second(times_s: Iterable[float], length: int, weights: Sequence[int] | None = None) -> NDArray[np.float64]:
    """Sums for each second; what comes later is left out."""
    places = np.fromiter((int(time_s) for time_s in times_s), dtype=np.int64)
    inside = places < length
    kept = None if weights is None else np.asarray(weights, dtype=np.float64)[inside]
    return np.bincount(places[inside], weights=kept, minlength=length).astype(np.float64)


def _silences(records: Sequence[Record], readers: Sequence[Record], least_s: float) -> Iterable[tuple[float, float]]:
    """All times longer than `least_s` without a sign of life while a reader's request was open."""
    signs_s = [time_s for record in records for time_s in record.message_times_s]
    signs_s += [record.ended_s for record in records if record.ok or record.status == LEFT]
    alive_s = np.sort(signs_s)
    for start_s, end_s in _open_spans(readers):
        first, last = np.searchsorted(alive_s, (start_s, end_s))
        moments_s = np.concatenate(([start_s], alive_s[first:last], [end_s]))
        for place in np.flatnonzero(np.diff(moments_s) > least_s):
            yield float(moments_s[place]), float(moments_s[place + 1])


def _open_spans(readers: Sequence[Record]) -> list[tuple[float, float]]:
    """When at least one request was open: requests of (0, 2), (1, 3) and (5, 6) give (0, 3) and (5, 6)."""
    spans: list[tuple[float, float]] = []
    for sent_s, ended_s in sorted((record.sent_s, record.ended_s) for record in readers):
        if spans and sent_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], ended_s))
        else:
            spans.append((sent_s, ended_s))
    return spans


def _mid_stream(readers: Sequence[Record], start_s: float, until_s: float) -> bool:
    """Whether a request that had its first message waited from `start_s` past `until_s` for the next, or its end."""
    return any(
        before <= start_s and after > until_s
        for record in readers
        if record.message_times_s
        for before, after in pairwise((*record.message_times_s, record.ended_s))
    )
