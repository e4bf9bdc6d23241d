"""What `GetStats` gathers: counters since each process started, and facts about the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


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
    start_time_s: float
    """Seconds since 1970."""
    cpu_s: float
    """User and system time since then."""


@dataclass(frozen=True, kw_only=True)
class StageCounters:
    """What a stage has done since it was loaded."""

    name: str
    """`0.1` is stage 1 of replica 0."""
    busy_ns: int
    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class RouterCounters:
    """What a router has done since it started, and how full it is."""

    name: str
    microbatches: int
    tokens: int
    prompt_tokens: int
    completion_tokens: int
    preemptions: int
    waiting: int
    running: int
    in_flight_microbatches: int
    kv_blocks_used: tuple[int, ...]
    """One entry a window class."""
    kv_blocks_total: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """One reading of all of them."""

    processes: tuple[ProcessFacts, ...]
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
