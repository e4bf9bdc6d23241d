"""A `serve` whose service can no longer serve says so and ends, also where it is Ray that is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_cluster import RayCluster
from service import eventually

from tramontane.client import Client, ClientOptions, HealthStatus, StatusError, Unavailable

pytestmark = pytest.mark.ray

VERSE = "The wind that from the northern mountain falls\nHath swept the harbour clean of idle sail,\n"
TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))


class Program:
    """`tramontane serve --json`, its stdout apart from what else is printed."""

    def __init__(self, *options: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [TRAMONTANE, "serve", "--json", "--port", "0", "--stages", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def events(self) -> list[dict[str, str]]:
        """All lines must be JSON objects."""
        return [json.loads(line) for line in list(self.lines)]

    def told(self, event: str) -> dict[str, str]:
        """The first of that name, once it was told."""

        def found() -> list[dict[str, str]]:
            return [each for each in self.events if each["event"] == event]

        eventually(lambda: bool(found()) or self.process.poll() is not None, 120)
        assert found(), self.lines
        return found()[0]

    def end(self) -> int:
        """The exit status, by itself."""
        status = self.process.wait(90)
        self._reader.join(10)
        return status


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Ends what a test that failed has left running."""
    started: list[Program] = []
    yield started
    for program in started:
        if program.process.poll() is None:
            program.process.send_signal(signal.SIGINT)
            program.end()


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_while_streaming(client: Client, pid: int) -> None:
    """A request that is under way then is told at once."""
    with client.stream(VERSE, max_tokens=3000, ignore_eos=True) as stream:
        next(iter(stream))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            list(stream)


def ended(client: Client) -> bool:
    """Health says that nothing serves; soon after a break nobody is left to say it."""
    try:
        return client.health() is HealthStatus.NOT_SERVING
    except Unavailable:
        return True


def answers(client: Client, dead: int) -> bool:
    """A controller other than the dead one has found all parts again."""
    try:
        pids = {process.pid for process in client.stats().processes}
    except StatusError:
        return False
    return dead not in pids and len(pids) == 5


@pytest.mark.parametrize(
    ("server", "said"), [("raylet", "the raylet of this node is gone"), ("gcs_server", "Ray's GCS is gone")]
)
def test_a_server_of_our_own_ray_that_is_gone_ends_serve_and_everything(programs, server: str, said: str) -> None:
    program = Program()
    programs.append(program)
    with Client(program.told("ready")["target"]) as client:
        processes = [psutil.Process(process.pid) for process in client.stats().processes]
    children = psutil.Process(program.process.pid).children(recursive=True)
    next(child for child in children if child.name() == server).kill()
    assert program.end() == 1
    broken, left = program.events[-2:]
    assert (broken["event"], broken["message"], left["event"]) == ("broken", f"not serving: {said}", "left")
    eventually(lambda: not any(running(process) for process in [*processes, *children]))


@pytest.mark.parametrize("role", ["router", "gateway"])
def test_a_part_that_is_gone_ends_its_requests_serve_and_everything(programs, role: str) -> None:
    program = Program()
    programs.append(program)
    with Client(program.told("ready")["target"], ClientOptions(wait=False)) as client:
        parts = client.stats().processes
        children = psutil.Process(program.process.pid).children(recursive=True)
        kill_while_streaming(client, next(part.pid for part in parts if part.role == role))
        if role == "router":
            eventually(lambda: ended(client))
    assert program.end() == 1
    assert [event["event"] for event in program.events[-4:]] == ["broken", "ending", "ended", "left"]
    assert Path(program.events[-1]["folder"], "logs").is_dir()
    eventually(lambda: not any(running(child) for child in children))


def test_a_controller_is_missed_by_nobody_and_a_stage_ends_its_requests_at_once(programs) -> None:
    program = Program("--stages", "2", "--dtype", "float32")
    programs.append(program)
    with Client(program.told("ready")["target"], ClientOptions(wait=False)) as client:
        processes = client.stats().processes
        children = psutil.Process(program.process.pid).children(recursive=True)
        controller = next(process for process in processes if process.role == "controller")
        stage = next(process for process in processes if process.name == "0.1")
        with client.stream(VERSE, max_tokens=400, ignore_eos=True) as stream:
            next(iter(stream))
            os.kill(controller.pid, signal.SIGKILL)
            assert sum(len(delta.token_ids) for delta in stream) == 399
        eventually(lambda: answers(client, controller.pid), 60)
        assert client.health() is HealthStatus.SERVING
        kill_while_streaming(client, stage.pid)
        eventually(lambda: ended(client))
        with pytest.raises(Unavailable):
            client.generate("x", timeout_s=10)
    assert program.end() == 1
    assert [event["event"] for event in program.events[-4:]] == ["broken", "ending", "ended", "left"]
    eventually(lambda: not any(running(child) for child in children))


@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_a_server_of_another_ray_that_is_gone_ends_serve(programs, server: str) -> None:
    """The GCS has no storage. `ray start --block` ends the rest of the head's processes when one of them is gone."""
    cluster = RayCluster(1)
    try:
        program = Program("--address", cluster.address, environment=cluster.environment)
        programs.append(program)
        program.told("ready")
        children = psutil.Process(cluster.nodes[0].pid).children(recursive=True)
        next(child for child in children if child.name() == server).kill()
        assert program.end() == 1
        assert "not serving: " in program.told("broken")["message"]
    finally:
        cluster.end()


@pytest.mark.skipif("TRAMONTANE_SLOW_TESTS" not in os.environ, reason="takes a minute: set TRAMONTANE_SLOW_TESTS=1")
def test_a_gcs_that_others_outlive_is_waited_for_and_then_ends_serve(programs) -> None:
    """Were it to come back, the service would go on."""
    cluster = RayCluster(1)
    try:
        program = Program("--address", cluster.address, environment=cluster.environment)
        programs.append(program)
        program.told("ready")
        head = psutil.Process(cluster.nodes[0].pid)
        head.suspend()
        next(child for child in head.children(recursive=True) if child.name() == "gcs_server").kill()
        assert program.end() == 1
        assert program.told("broken")["message"].startswith("not serving: Ray's GCS has not answered for 4")
        head.resume()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(cluster.nodes[0].pid).resume()
        cluster.end()


def test_a_closed_stdout_does_not_end_a_service() -> None:
    """As in `serve | head -1`: what is told later has no reader, and the service serves on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TRAMONTANE, "serve", "--stages", "1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"starting Ray\n"
        process.stdout.close()
        with Client(f"127.0.0.1:{port}") as client:
            assert len(client.generate("The", max_tokens=3, ignore_eos=True, timeout_s=120).token_ids) == 3
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
