"""Parts that are stopped for a while (SIGSTOP) and go on: it costs the pause, and only a cut link ends requests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from ray_cluster import RayCluster
from service import Service, eventually

from tramontane.client import AsyncClient, Client, HealthStatus, Unavailable

pytestmark = pytest.mark.ray

PARTS = ["controller-0", "gateway-0", "router-0", "stage-0.0", "stage-0.1"]
USERS = 12
undisturbed: dict[tuple[str, int], list[list[int]]] = {}
"""What each user gets of a service, by its target and the tokens asked for."""

slow = pytest.mark.skipif("TRAMONTANE_SLOW_TESTS" not in os.environ, reason="minutes: set TRAMONTANE_SLOW_TESTS=1")


@pytest.fixture(scope="module")
def spread(two_nodes: RayCluster) -> Iterator[Service]:
    """Two stages on two nodes, so that their links are TCP."""
    service = Service(
        *("--stages", "2", "--cpus-per-stage", "1", "--dtype", "float32", "--address", two_nodes.address),
        environment=two_nodes.environment,
    )
    try:
        assert service.target
        yield service
    finally:
        assert service.end() == 0, service.output


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stopped_s", [3.0, pytest.param(30.0, marks=slow)])
async def test_a_part_of_one_node_is_stopped_and_goes_on(service: Service, part: str, stopped_s: float) -> None:
    await stop_and_go_on(service, part, stopped_s)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stopped_s", [5.0, pytest.param(30.0, marks=slow)])
async def test_a_part_of_two_nodes_is_stopped_and_goes_on(spread: Service, part: str, stopped_s: float) -> None:
    await stop_and_go_on(spread, part, stopped_s)


async def stop_and_go_on(service: Service, part: str, stopped_s: float) -> None:
    """Some users stream; the part is stopped as soon as all have tokens."""
    tokens = 3500 if stopped_s > 10 else 500  # what the stopped gateway's router goes on to make
    async with AsyncClient(service.target) as client:
        whole = (service.target, tokens)
        if whole not in undisturbed:
            undisturbed[whole] = await asyncio.gather(*(finish(client, user, tokens) for user in range(USERS)))
        pid = _pid(service, part)
        begun = [asyncio.Event() for _ in range(USERS)]
        running = [
            asyncio.create_task(finish(client, user, tokens, event))
            for user, event in zip(range(USERS), begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)
        finally:
            os.kill(pid, signal.SIGCONT)
        ended = await asyncio.gather(*running, return_exceptions=True)
    cut = [end for end in ended if isinstance(end, Unavailable)]
    print(f"{part} stopped for {stopped_s:.0f} s: {len(cut)} of {USERS} streams ended by a lost link")
    assert all(part == "gateway-0" and "link to router-0" in str(end) for end in cut), cut
    for end, expected in zip(ended, undisturbed[whole], strict=True):
        assert end in cut or end == expected
    with Client(service.target) as blocking:
        eventually(lambda: blocking.health() is HealthStatus.SERVING)
        eventually(lambda: not any(router.running + router.waiting for router in blocking.stats().routers))
        assert blocking.generate("The king", max_tokens=8, ignore_eos=True).token_ids
    if cut:
        service.wait_for("^degraded: gateway-0 has no link with router-0: ")
        service.wait_for("^serving again")


async def finish(client: AsyncClient, user: int, tokens: int, begun: asyncio.Event | None = None) -> list[int]:
    """One user's ids."""
    ids: list[int] = []
    prompt = f"{'KING' if user % 2 else 'DUKE'} {user}:\n" * (1 + user % 3)
    async with client.stream(prompt, max_tokens=tokens, seed=user, ignore_eos=True, timeout_s=200) as stream:
        async for delta in stream:
            ids.extend(delta.token_ids)
            if begun is not None:
                begun.set()
    return ids


def _pid(service: Service, part: str) -> int:
    with Client(service.target) as client:
        return next(each.pid for each in client.stats().processes if f"{each.role}-{each.name}" == part)
