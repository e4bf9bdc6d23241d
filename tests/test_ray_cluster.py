"""A service on a Ray cluster that was there before it: detached, ended by `down`, and spread over two nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_cluster import RayCluster
from service import eventually

from tramontane.client import Client

pytestmark = pytest.mark.ray

TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """Two nodes with one CPU each, so that two stages cannot lie on one."""
    cluster = RayCluster(1, 1)
    try:
        yield cluster
    finally:
        cluster.end()


def run(cluster: RayCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAMONTANE, *arguments, "--address", cluster.address],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_a_detached_service_over_two_nodes_lives_until_down(cluster: RayCluster) -> None:
    serve = ["serve", "--stages", "2", "--cpus-per-stage", "1", "--port", "0"]
    started = run(cluster, *serve, "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    target = started.stdout.split(" on ")[-1].strip()
    with Client(target) as client:
        assert len(client.generate("The king", max_tokens=12, ignore_eos=True).token_ids) == 12
        processes = client.stats().processes
    assert len({process.node for process in processes if process.role == "stage"}) == 2
    assert cluster.secret not in started.stdout + started.stderr

    second = run(cluster, *serve)
    assert second.returncode == 1
    assert "serves a model already" in second.stderr

    assert run(cluster, "down").returncode == 0
    eventually(lambda: not any(psutil.pid_exists(process.pid) for process in processes))
    assert run(cluster, "down").returncode == 1
