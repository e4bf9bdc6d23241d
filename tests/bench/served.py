"""Ours as users meet it: `tramontane serve` on Ray, asked through the client library over gRPC.

Beside the figures it reads what only the running service shows. *Busy share*: the part of the time that a stage spends
inside its steps, from the first token of any request to the first end of any, so that ramp and drain are cut off
(counters are read when a step ends, so each end of that time is uncertain by one step). *Cores*: the CPU time of the
stages, of the service's other processes with those of its Ray, and of this client, by the second: what the others take,
stages that fill the machine do not get. *Memory*: the proportional set size (PSS) of the stages' processes after the
last workload, less that of an idle process that has imported torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from service import Service

from bench.contestants import Job, Turn
from bench.workloads import Workload
from tramontane.client import AsyncClient, Stats


@dataclass
class Reading:
    """The stages' counters at a time."""

    time_s: float
    busy_ns: dict[str, int]


@dataclass
class Watch:
    """When each request had its first token, and what the stages' counters said at both ends of the middle."""

    client: AsyncClient
    begin_s: float = field(default_factory=time.perf_counter)
    firsts_s: list[float] = field(default_factory=list)
    ended: int = 0
    readings: list[asyncio.Task[Reading]] = field(default_factory=list)

    def first_token(self) -> None:
        """Of some request."""
        self.firsts_s.append(time.perf_counter() - self.begin_s)
        if len(self.firsts_s) == 1:
            self.readings.append(asyncio.create_task(self._read()))

    def end(self) -> None:
        """Of some request."""
        self.ended += 1
        if self.ended == 1:
            self.readings.append(asyncio.create_task(self._read()))

    async def _read(self) -> Reading:
        before = time.perf_counter()
        stats: Stats = await self.client.stats()
        return Reading((before + time.perf_counter()) / 2, {stage.name: stage.busy_ns for stage in stats.stages})

    async def busy(self) -> dict[str, float]:
        """Each stage's share of the time between the two readings."""
        start, stop = [await reading for reading in self.readings]
        middle_s = stop.time_s - start.time_s
        return {name: (stop.busy_ns[name] - start.busy_ns[name]) / 1e9 / middle_s for name in start.busy_ns}


async def run(client: AsyncClient, workload: Workload) -> dict[str, Any]:
    """All requests of a workload at once, each a stream of its own."""
    watch = Watch(client)

    async def read(prompt: tuple[int, ...]) -> list[int]:
        tokens: list[int] = []
        stream = client.stream(prompt, max_tokens=workload.new_tokens, temperature=0.0, ignore_eos=True)
        async with stream:
            async for delta in stream:
                if delta.token_ids and not tokens:
                    watch.first_token()
                tokens.extend(delta.token_ids)
        watch.end()
        return tokens

    tokens = await asyncio.gather(*(read(prompt) for prompt in workload.prompts))
    wall_s = time.perf_counter() - watch.begin_s
    busy = await watch.busy()
    return {"wall_s": wall_s, "first_s": max(watch.firsts_s), "tokens": tokens, "busy": busy}


@dataclass(frozen=True)
class Usage:
    """CPU seconds that processes have used since they began."""

    stages: float
    others: float
    """Of the service: whatever else `serve` has started, itself included."""
    client: float
    """This process."""

    @classmethod
    def of(cls, serve_pid: int, stage_pids: set[int]) -> Usage:
        """Up to now, of the processes below `serve_pid`."""
        root, seconds = psutil.Process(serve_pid), {}
        for each in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's come and go
                seconds[each.pid] = sum(each.cpu_times()[:2])
        own = sum(psutil.Process().cpu_times()[:2])
        stages = sum(seconds[pid] for pid in stage_pids)
        return cls(stages, sum(seconds.values()) - stages, own)

    def cores(self, before: Usage, wall_s: float) -> dict[str, float]:
        """What was used since then, in cores."""
        earlier = vars(before)
        return {who: (seconds - earlier[who]) / wall_s for who, seconds in vars(self).items()}


async def run_all(service: Service, job: Job) -> tuple[dict[str, Any], Stats]:
    """Every workload, then the processes."""
    runs = {}
    async with AsyncClient(service.target) as client:
        await run(client, job.warm_up)
        serve_pid = service.process.pid
        stage_pids = {process.pid for process in (await client.stats()).processes if process.role == "stage"}
        for workload in job.workloads:
            before = Usage.of(serve_pid, stage_pids)
            runs[workload.name] = done = await run(client, workload)
            done["cores"] = Usage.of(serve_pid, stage_pids).cores(before, done["wall_s"])
        return runs, await client.stats()


def take_turn(job: Job, stages: int) -> Turn:
    """Start the service, ask it, end it."""
    threads = max(1, job.threads // stages)
    options = ["--stages", str(stages), "--threads", str(threads), "--dtype", job.dtype]
    if job.quantize:
        options += ["--quantize", job.quantize]
    # Ray starts workers at niceness 15. On a machine that others use, too, that alone would cost half of a figure.
    os.environ.setdefault("RAY_worker_niceness", "0")
    service = Service(str(job.model), *options)
    try:
        runs, stats = asyncio.run(run_all(service, job))
        pids = [process.pid for process in stats.processes if process.role == "stage"]
        memory = {"stages_mb": sum(map(pss_mb, pids)), "idle_mb": stages * idle_mb()}
    finally:
        service.end()
    return Turn(f"{stages} x {threads} threads", runs, memory)


def pss_mb(pid: int | str) -> float:
    """A process's memory, pages that it shares counted in proportion."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        line = next(line for line in rollup if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024


def idle_mb() -> float:
    """The memory of a process that has imported torch and does nothing."""
    script = "import sys, torch; print(flush=True); sys.stdin.read()"
    idle = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert idle.stdin is not None
    assert idle.stdout is not None
    try:
        idle.stdout.readline()
        return pss_mb(idle.pid)
    finally:
        idle.stdin.close()
        idle.wait(30)
