"""How fast the generator itself can be: the same workers against a server that answers at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tramontane.client.loadtest.generator.fleet import Fleet
from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.plan import Ask, Load, Plan
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import Ceiling

MEASURED_S = 2.0
WARMUP_S = 0.5
USERS = 16
"""A worker. More do not make it faster."""
TOKENS = 32


async def measure_ceiling(*, workers: int, http: bool) -> Ceiling:
    """Requests and messages a second that this many workers read from a null server on this machine.

    The null server takes its share of the same cores, so the figure is a lower bound.
    """
    plan = Plan(
        load=Load(kind="closed", duration_s=WARMUP_S + MEASURED_S, warmup_s=WARMUP_S, seed=0, users=USERS * workers),
        asks=tuple(
            Ask(number=number, prompt="null" if http else (1, 2, 3), max_tokens=TOKENS, ignore_eos=True)
            for number in range(USERS * workers)
        ),
    )
    records: list[Record] = []
    async with (
        _null_server(http=http) as address,
        Fleet(plan, TargetOptions(address=address), workers=workers, drain_s=5.0) as fleet,
    ):
        fleet.start()
        await fleet.collect(records.append)
    ended = [record for record in records if record.ok and WARMUP_S <= record.ended_s < plan.load.duration_s]
    times_s = [time_s for record in records for time_s in record.message_times_s]
    messages = sum(WARMUP_S <= time_s < plan.load.duration_s for time_s in times_s)
    return Ceiling(requests_per_s=len(ended) / MEASURED_S, messages_per_s=messages / MEASURED_S)


@asynccontextmanager
async def _null_server(*, http: bool) -> AsyncIterator[str]:
    """Its address as a target's."""
    module = "tramontane.client.loadtest.generator." + ("null_http_server" if http else "null_server")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        word, _, address = (await process.stdout.readline()).decode().strip().partition(" ")
        if word != "ready":
            raise ConnectionError("the null server did not start")
        yield address
    finally:
        process.stdin.close()  # it ends with its input
        await process.wait()
