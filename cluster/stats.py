"""What `GetStats` gathers: counters since each process started, and facts about the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from tramontane.stages.counters import StageStats


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


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """One reading of all of them."""

    processes: tuple[ProcessFacts, ...]
    stages: tuple[StageCounters, ...]
    routers: tuple[RouterCounters, ...]
    gateways: tuple[GatewayCounters, ...]


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
