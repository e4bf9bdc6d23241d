"""What `GetStats` gathers: counters since each process started, and facts about the processes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import psutil

from tramontane.stages.counters import StageStats

REFUSAL_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class ProcessFacts:
    """One process of the service."""

    role: str
    """controller, gateway, router or stage."""
    name: str
    """`0` for gateway 0 or router 0, `0.1` for stage 1 of replica 0."""
    node: str
    """Ray's id of its node."""
    pid: int
    """The operating system's number for it, on its node."""
    start_time_s: float
    """Seconds since 1970, by its node's clock."""
    cpu_s: float
    """Seconds of user and system CPU time since then."""


@dataclass(frozen=True, kw_only=True)
class StageCounters(StageStats):
    """What a stage has done since it was loaded, and which one it is."""

    name: str
    """`0.1` is stage 1 of replica 0."""


@dataclass(frozen=True, kw_only=True)
class AdmissionCounters:
    """Whom a router has refused since it started, and what it estimates now. None where nothing was measured."""

    refused_queue_full: int
    """`max_waiting` requests waited."""
    refused_queue_wait: int
    """They would have waited longer than `max_queue_wait_s`."""
    refused_deadline: int
    """They could not have ended before their deadline."""
    estimated_wait_s: float | None
    """What a request that came now would wait until its prefill begins."""
    seats: int
    """Sequences that may run."""
    decode_step_s: float | None
    """A decode step of as many rows as are worth while."""
    max_step_s: float | None
    """The longest step while others decode, unless decode alone takes half of it."""
    prompt_row_s: float | None
    """A token of a prompt, in a step that is made anyway."""


@dataclass(frozen=True, kw_only=True)
class RouterCounters:
    """What a router has done since it started, and how full it is."""

    name: str
    """`0` is the router of replica 0."""
    microbatches: int
    """Sent to stage 0 since the start."""
    tokens: int
    """Their rows: prompts, decode and what was computed again after a preemption."""
    prompt_tokens: int
    """Tokens of the prompts whose first token has been chosen, each prompt once."""
    completion_tokens: int
    """Tokens generated, the ones that ended completions included."""
    preemptions: int
    """Times that a sequence lost its computed rows to an older one, to be computed again later."""
    waiting: int
    """Sequences that wait to be admitted now, the preempted included."""
    running: int
    """Sequences that are admitted now."""
    in_flight_microbatches: int
    """Microbatches sent whose results are not back now."""
    kv_blocks_used: tuple[int, ...]
    """KV blocks that sequences hold now, one entry a window class."""
    kv_blocks_total: tuple[int, ...]
    """KV blocks that there are, one entry a window class."""
    admission: AdmissionCounters
    late: str
    """Which stage takes far longer than such a step does here; empty where none does."""


@dataclass(frozen=True, kw_only=True)
class GatewayCounters:
    """How a gateway fares."""

    name: str
    """`0` is gateway 0."""
    open_calls: int
    """Of all methods, now."""
    refused_calls: int
    """Because their user had its share of open calls, since the start."""
    tokenizing_bytes: int
    """Of requests that wait to be tokenized, or are being tokenized, now."""
    longest_stall_ms: float
    """The longest time for which the event loop stood still, since the start."""
    recent_stall_ms: float
    """The same over the last minute."""
    longest_own_stall_ms: float
    """As `longest_stall_ms`, without the time for which other threads had the machine's cores."""
    recent_own_stall_ms: float
    """The same over the last minute."""
    refusal_bounds_s: tuple[float, ...] = REFUSAL_BOUNDS_S
    refusal_counts: tuple[int, ...] = (0,) * len(REFUSAL_BOUNDS_S)
    """Calls that ended with RESOURCE_EXHAUSTED, by the time from their arrival to the status: each count is of those
    that took at most its bound, and longer than the bound before."""


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """One reading of all of them."""

    processes: tuple[ProcessFacts, ...]
    late: tuple[str, ...]
    """Parts that do not answer, or stages that are late, a line each."""
    gateways: tuple[GatewayCounters, ...]
    stages: tuple[StageCounters, ...]
    routers: tuple[RouterCounters, ...]


def process_facts(role: str, name: str, node: str) -> ProcessFacts:
    """Facts about the calling process."""
    process = psutil.Process(os.getpid())
    times = process.cpu_times()
    return ProcessFacts(
        role=role,
        name=name,
        node=node,
        pid=process.pid,
        start_time_s=process.create_time(),
        cpu_s=times.user + times.system,
    )
