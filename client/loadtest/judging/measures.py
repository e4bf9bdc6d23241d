"""From records to the figures of a run.

Who counts where, with a window of [10 s, 60 s):

- Latencies, objectives and goodput: requests that were *due* in the window, whenever they ended, read by clients that
  keep up (NORMAL and CHURN). A slow reader's own pauses would pass for the server's, so SLOW ones only enter `Counts`.
- Latencies: completed requests. Of the others one knows only that they took longer; objectives take them for infinite.
- Tokens per second: every token that came in the window, whosever it is, for the server made it. A prompt's tokens
  count when its first token comes, for then they have been read.
- Requests per second, goodput: requests that ended in the window. Only one that was answered in full, within its
  deadline and every objective, is goodput.
- Refusals: their own latency, from sending to the status. They fail objectives and are no goodput, however quick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tramontane.client.loadtest.judging.latency import tokens, tokens_by_message, values_ms
from tramontane.client.loadtest.judging.objectives import answered, met_all, verdicts
from tramontane.client.loadtest.judging.quantiles import distribution, grouped_distribution
from tramontane.client.loadtest.plan import Conduct, Load
from tramontane.client.loadtest.record import CUT, UNREADABLE, Record
from tramontane.client.loadtest.result import (
    MEASURES,
    Breakdown,
    Counts,
    Distribution,
    Objective,
    ObjectiveResult,
    Samples,
    Throughput,
)

Window = tuple[float, float]

JUDGED = (Conduct.NORMAL, Conduct.CHURN)
"""Clients whose latencies are the server's doing."""
COUNTED = (*JUDGED, Conduct.SLOW)
"""Clients that want an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What records alone say about a run; each field becomes one of `RunResult`."""

    counts: Counts
    latencies: dict[str, Distribution]
    throughput: Throughput
    objectives: tuple[ObjectiveResult, ...]
    breakdown: Breakdown | None
    refusals: Distribution | None
    send_lag: Distribution | None
    """For `GeneratorLag`."""
    samples: Samples
    empty: int
    """Completed requests without a single token."""
    uncounted: int
    """Completed requests whose tokens the server did not count; one per message is assumed."""
    unreadable: tuple[str, ...]
    """Of each request whose answer could not be decoded, what was wrong with it."""


def measure(records: Sequence[Record], load: Load, window_s: Window, objectives: Sequence[Objective]) -> Measured:
    """All figures of the requests in the window."""
    arrived = sorted((record for record in records if _within(record.intended_s, window_s)), key=_intended)
    counted = [record for record in arrived if record.conduct in COUNTED]
    judged = [record for record in arrived if record.conduct in JUDGED]
    completed = [record for record in judged if record.ok]
    return Measured(
        counts=_counts(counted),
        latencies=_latencies(completed),
        throughput=_throughput(records, judged, load, window_s, objectives),
        objectives=verdicts(judged, objectives, is_open=load.is_open),
        breakdown=_breakdown(completed),
        refusals=distribution([(each.ended_s - each.sent_s) * 1000 for each in counted if each.refused]),
        send_lag=distribution([(record.sent_s - record.intended_s) * 1000 for record in arrived]),
        samples=_samples(completed, objectives),
        empty=sum(not answered(record) for record in completed),
        uncounted=sum(answered(record) and not record.completion_tokens for record in completed),
        unreadable=tuple(record.error for record in sorted(records, key=_intended) if record.status == UNREADABLE),
    )


def _within(time_s: float, window_s: Window) -> bool:
    return window_s[0] <= time_s < window_s[1]


def _intended(record: Record) -> float:
    return record.intended_s


def _counts(counted: Sequence[Record]) -> Counts:
    by_status = Counter(record.status for record in counted)
    first_errors: dict[str, str] = {}
    for record in counted:
        if record.error:
            first_errors.setdefault(record.status, record.error)
    return Counts(
        sent=len(counted),
        completed=sum(record.ok for record in counted),
        failed=sum(record.failed for record in counted),
        cut=by_status[CUT],
        by_status={status: count for status, count in by_status.most_common() if count},
        refused=sum(record.refused for record in counted),
        first_errors=first_errors,
    )


def _latencies(completed: Sequence[Record]) -> dict[str, Distribution]:
    found = {measure: grouped_distribution([values_ms(each, measure) for each in completed]) for measure in MEASURES}
    return {measure: each for measure, each in found.items() if each is not None}


def _throughput(
    records: Sequence[Record],
    judged: Sequence[Record],
    load: Load,
    window_s: Window,
    objectives: Sequence[Objective],
) -> Throughput:
    seconds = window_s[1] - window_s[0] or float("inf")  # stopped in its warm-up: rates of 0
    messages = [
        count
        for record in records
        for time_s, count in zip(record.message_times_s, tokens_by_message(record), strict=True)
        if _within(time_s, window_s)
    ]
    read = [each for each in records if each.message_times_s and _within(each.message_times_s[0], window_s)]
    ended = [each for each in records if each.ok and each.conduct in COUNTED and _within(each.ended_s, window_s)]
    judge = load.is_open and bool(objectives)
    good = sum(met_all(record, objectives) for record in ended if record.conduct in JUDGED) if judge else None
    share = _share(met_all(record, objectives) for record in judged) if judge else None
    prompt_tokens = sum(record.prompt_tokens for record in read)
    return Throughput(
        requests_per_s=len(ended) / seconds,
        goodput_per_s=None if good is None else good / seconds,
        goodput_share=share,
        input_tokens_per_s=prompt_tokens / seconds if prompt_tokens or not read else None,
        output_tokens_per_s=sum(messages) / seconds,
        tokens_per_message=sum(messages) / len(messages) if messages else None,
    )


def _share(truths: Iterable[bool]) -> float | None:
    found = list(truths)
    return sum(found) / len(found) if found else None


def _breakdown(completed: Sequence[Record]) -> Breakdown | None:
    """Means over the requests for which the server told its timings. What is left of the end-to-end latency is network.

    Due at 0 ms, sent at 2 ms, answered at 152 ms; the server queued 10 ms, prefilled 40 ms and decoded 95 ms: client
    lag 2 ms, network 5 ms.
    """
    told = [(record, record.server) for record in completed if record.server is not None]
    if not told:
        return None
    lag = _mean((record.sent_s - record.intended_s) * 1000 for record, _ in told)
    whole = _mean((record.ended_s - record.intended_s) * 1000 for record, _ in told)
    queue = _mean(server.queue_ms for _, server in told)
    prefill = _mean(server.prefill_ms for _, server in told)
    decode = _mean(server.decode_ms for _, server in told)
    return Breakdown(
        client_lag_ms=lag,
        queue_ms=queue,
        prefill_ms=prefill,
        decode_ms=decode,
        network_ms=whole - lag - queue - prefill - decode,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _samples(completed: Sequence[Record], objectives: Sequence[Objective]) -> Samples:
    """One row per completed request, empty answers aside; times to the microsecond, which keeps files small."""
    rows = [record for record in completed if answered(record)]

    def one(record: Record, measure: str) -> float:
        return round(values_ms(record, measure)[0], 3)

    return Samples(
        arrived_s=tuple(round(record.intended_s, 6) for record in rows),
        ttfts_ms=tuple(one(record, "ttft") for record in rows),
        e2els_ms=tuple(one(record, "e2el") for record in rows),
        tpots_ms=tuple(one(record, "tpot") if tokens(record) > 1 else None for record in rows),
        itls_ms=tuple(tuple(round(gap, 3) for gap in values_ms(record, "itl")) for record in rows),
        input_lens=tuple(record.prompt_tokens for record in rows),
        output_lens=tuple(tokens(record) for record in rows),
        met=tuple(met_all(record, objectives) for record in rows),
    )
