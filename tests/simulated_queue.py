"""Requests through a simulated server on a virtual clock, as the records that a perfect generator would write."""

from __future__ import annotations

import heapq

import numpy as np

from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.record import OK, Record

THE_EXAMPLE = Record(
    number=0,
    intended_s=2.000,
    sent_s=2.001,
    message_times_s=(2.101, 2.151),
    message_tokens=(1, 2),
    ended_s=2.152,
    status="OK",
    completion_tokens=3,
)
"""The one at the head of `record.py`."""


def open_load(duration_s, warmup_s=0.0, kind="poisson", rate=10.0):
    return Load(kind=kind, duration_s=duration_s, warmup_s=warmup_s, seed=0, rate=rate)


def answer(intended_s, first_s, ended_s, *, tokens=1, **changes):
    """A completed request whose tokens came one by one, evenly between the first and the end."""
    first_s, ended_s = float(first_s), float(ended_s)
    gap_s = (ended_s - first_s) / (tokens - 1) if tokens > 1 else 0.0
    values = {
        "number": 0,
        "intended_s": float(intended_s),
        "sent_s": float(intended_s),
        "message_times_s": (first_s, *(first_s + place * gap_s for place in range(1, tokens - 1)), ended_s)[:tokens],
        "message_tokens": (1,) * tokens,
        "ended_s": ended_s,
        "status": OK,
        "prompt_tokens": 10,
        "completion_tokens": tokens,
    }
    return Record(**(values | changes))


def queue(arrivals_s, services_s, servers=1, *, tokens=1):
    """First come, first served: each request takes the first server that is free, and decodes while it has it."""
    free_s = [0.0] * servers
    records = []
    for arrival_s, service_s in zip(arrivals_s, services_s, strict=True):
        begun_s = max(heapq.heappop(free_s), arrival_s)
        ended_s = begun_s + service_s
        heapq.heappush(free_s, ended_s)
        first_s = ended_s if tokens == 1 else begun_s + service_s / tokens
        records.append(answer(arrival_s, first_s, ended_s, tokens=tokens))
    return records


def poisson_queue(random, *, rate, service_s, duration_s, servers=1, tokens=1):
    """M/M/c."""
    arrivals_s = np.sort(random.uniform(0, duration_s, random.poisson(rate * duration_s)))
    return queue(arrivals_s, random.exponential(service_s, len(arrivals_s)), servers, tokens=tokens)
