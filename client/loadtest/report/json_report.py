"""A result as one JSON document, and back.

The top level is flat and uses the names of vLLM's `bench serve` where they mean the same, so that scripts written for
those files read ours; `result` holds everything, exactly, and is the only part that is read back. Three things to know
when both tools' files lie side by side: we count the measured window, warm-up and drain cut off; our latencies begin at
the intended arrival, not at sending; lists are of completed requests only. As there, lists are in seconds and summaries
in milliseconds. `refused` are among the `failed`, and `p99_refusal_ms` and its like say how long they waited for their
refusal, from sending.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from tramontane.client.loadtest.report.wording import percentile
from tramontane.client.loadtest.result import QUANTILES, RunResult, SweepResult

RESULT = "result.json"
"""The document's name in a folder that `--out` names."""
SCHEMA = "tramontane.bench/1"
"""Its number grows when a field of `result` changes its meaning or goes; a new field with a default needs none."""

_SUMMARISED = ("ttft", "tpot", "itl", "e2el")


class _Head(msgspec.Struct):
    schema: str = ""
    kind: str = ""
    result: msgspec.Raw = msgspec.Raw(b"null")


def to_json(result: RunResult | SweepResult) -> bytes:
    """One document of a run or a sweep."""
    if isinstance(result, RunResult):
        document = {"schema": SCHEMA, "kind": "run", **_summary(result), **_lists(result)}
    else:
        document = {"schema": SCHEMA, "kind": "sweep", "best_rate": result.best_rate}
        document |= {"first_missed_rate": result.first_missed_rate, "levels": [*map(_summary, result.levels)]}
    return msgspec.json.encode(document | {"result": result})


def from_json(data: bytes) -> RunResult | SweepResult:
    """What `to_json` was given.

    Raises:
        ValueError: this is another kind of file; the message says which, and what is wrong with it.
    """
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a result of `tramontane bench`: {error}") from error
    if head.schema != SCHEMA:
        said = f"its schema is {head.schema!r}" if head.schema else "it names no schema"
        raise ValueError(f"not a result that this version reads: {said}, and {SCHEMA!r} is expected")
    if head.kind not in ("run", "sweep"):
        raise ValueError(f"a result's kind is 'run' or 'sweep', not {head.kind!r}")
    try:
        if head.kind == "run":
            return msgspec.json.decode(head.result, type=RunResult)
        return msgspec.json.decode(head.result, type=SweepResult)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a damaged result of {SCHEMA}: {error}") from error


def _summary(result: RunResult) -> dict[str, Any]:
    """The flat fields, under vLLM's names."""
    start, end = result.window_s
    rates, samples, load = result.throughput, result.samples, result.load
    peak = max((second.output_tokens for second in result.timeline if start <= second.at_s < end), default=None)
    summary: dict[str, Any] = {
        "date": result.date,
        "backend": result.target.kind,
        "model_id": result.target.model,
        "num_prompts": result.counts.sent,
        "request_rate": load.rate,
        "burstiness": 1.0 if load.kind == "poisson" else load.burstiness,
        "max_concurrency": load.users,
        "duration": end - start,
        "completed": result.counts.completed,
        "failed": result.counts.failed + result.counts.cut,
        "refused": result.counts.refused,
        "total_input_tokens": sum(samples.input_lens) or None,
        "total_output_tokens": sum(samples.output_lens),
        "request_throughput": rates.requests_per_s,
        "request_goodput": rates.goodput_per_s,
        "output_throughput": rates.output_tokens_per_s,
        "total_token_throughput": _total(rates.input_tokens_per_s, rates.output_tokens_per_s),
        "max_output_tokens_per_s": peak,
    }
    for measure, found in (*((name, result.latencies.get(name)) for name in _SUMMARISED), ("refusal", result.refusals)):
        summary[f"mean_{measure}_ms"] = found.mean if found else None
        summary[f"median_{measure}_ms"] = found.at(0.5) if found else None
        summary[f"std_{measure}_ms"] = found.std if found else None
        for q in QUANTILES[1:]:
            summary[f"{percentile(q)}_{measure}_ms"] = found.at(q) if found else None
    return summary


def _total(one: float | None, other: float) -> float | None:
    return None if one is None else one + other


def _lists(result: RunResult) -> dict[str, Any]:
    """A value per completed request, as vLLM's `--save-detailed` writes them."""
    samples = result.samples
    return {
        "start_times": samples.arrived_s,
        "input_lens": samples.input_lens,
        "output_lens": samples.output_lens,
        "ttfts": _seconds(samples.ttfts_ms),
        "itls": [*map(_seconds, samples.itls_ms)],
        "latencies": _seconds(samples.e2els_ms),
    }


def _seconds(values_ms: Iterable[float]) -> list[float]:
    """To the microsecond: the exact values stand in `result`."""
    return [round(value / 1000, 6) for value in values_ms]
