"""Fixtures that several files share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_results
from fake_server import FakeServer
from ray_cluster import RayCluster
from service import Service

from tramontane.client import Client
from tramontane.client.loadtest.result import RunResult, SweepResult

# Where the tests run in the background, SIGINT is ignored, and every process that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Log files, sockets and records of the services that tests start. Paths of sockets are short.
_state = tempfile.TemporaryDirectory(prefix="tramontane-tests-")
os.environ["XDG_STATE_HOME"] = _state.name
_runtime = tempfile.TemporaryDirectory(prefix="tr-", dir="/tmp")
os.environ["XDG_RUNTIME_DIR"] = _runtime.name

EMBEDDED = Path(__file__).parent.parent / "deploy" / "embedded"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist begin with the tests that start Ray: theirs are the longest files."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    return EMBEDDED


@pytest.fixture(scope="session")
def one() -> RunResult:
    """A load test's result, with a fault in it."""
    return sample_results.run(fault=True)


@pytest.fixture(scope="session")
def many() -> SweepResult:
    """A sweep of three levels, the last of which misses its objectives."""
    return sample_results.sweep((4.0, 16.0, 24.0))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server that counts, for the client library and its command line."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The embedded model in float32 on two stages, over real Ray and real gRPC. Tests must leave it serving."""
    running = Service("--stages", "2", "--dtype", "float32")
    try:
        assert running.target
        yield running
    finally:
        assert running.end() == 0, running.output


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    """A Ray of two nodes with one CPU each, so that two stages cannot lie on one. Tests must leave nothing served."""
    cluster = RayCluster(1, 1)
    try:
        yield cluster
    finally:
        cluster.end()
