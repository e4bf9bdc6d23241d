"""A service on a Ray cluster that was there before it: detached, ended by `down`, and spread over two nodes.

One is started and joined as the README says.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from ray_cluster import RayCluster
from service import eventually

from tramontane.client import Client

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))


def run(cluster: RayCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAMONTANE, *arguments, "--address", cluster.address],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def down(cluster: RayCluster) -> tuple[int, list[str]]:
    """The exit status, and the events that it told."""
    done = run(cluster, "down", "--json")
    return done.returncode, [json.loads(line)["event"] for line in done.stdout.splitlines()]


@contextlib.contextmanager
def joined(cluster: RayCluster) -> Iterator[ModuleType]:
    """Ray, connected to the cluster from this process."""
    os.environ["RAY_AUTH_MODE"] = cluster.environment["RAY_AUTH_MODE"]
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield ray
    finally:
        ray.shutdown()


def test_a_detached_service_over_two_nodes_lives_until_down(two_nodes: RayCluster) -> None:
    serve = ["serve", "--stages", "2", "--cpus-per-stage", "1", "--port", "0"]
    started = run(two_nodes, *serve, "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    target = started.stdout.split(" on ")[-1].strip()
    with Client(target) as client:
        assert len(client.generate("The king", max_tokens=12, ignore_eos=True).token_ids) == 12
        processes = client.stats().processes
    assert len({process.node for process in processes if process.role == "stage"}) == 2
    assert two_nodes.secret not in started.stdout + started.stderr

    second = run(two_nodes, *serve)
    assert second.returncode == 1
    assert "serves a model already" in second.stderr

    gateway = next(process for process in processes if process.role == "gateway")
    os.kill(gateway.pid, signal.SIGSTOP)  # a hung part must not keep the others alive
    assert down(two_nodes) == (0, ["ending", "ended"])
    eventually(lambda: not any(psutil.pid_exists(process.pid) for process in processes))
    assert down(two_nodes) == (1, ["nothing"])


def test_a_killed_serve_leaves_its_service_running_and_what_is_left_of_one_is_refused(two_nodes: RayCluster) -> None:
    serve = [TRAMONTANE, "serve", "--port", "0", "--address", two_nodes.address]
    with joined(two_nodes) as ray:  # one stage must not ask for what two nodes have together
        eventually(lambda: ray.cluster_resources().get("CPU") == 2)
    first = subprocess.Popen(serve, env=two_nodes.environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    target = next(line for line in first.stdout if line.startswith("ready")).split(" on ")[-1].strip()
    first.kill()
    first.wait(30)
    with Client(target) as client:
        assert client.generate("The king", max_tokens=4, ignore_eos=True).token_ids
        processes = client.stats().processes

    with joined(two_nodes) as ray:
        gateway = ray.get_actor("gateway-0", namespace="tramontane")
        # Garbage collections leave out what was there before the port was open.
        assert ray.get(gateway.__ray_call__.remote(lambda _: gc.get_freeze_count())) > 10_000
        ray.kill(ray.get_actor("controller", namespace="tramontane"))
    refused = run(two_nodes, "serve", "--port", "0")
    assert refused.returncode == 1
    assert "stage-0.0" in refused.stderr
    assert run(two_nodes, "down").returncode == 0
    eventually(lambda: not any(psutil.pid_exists(process.pid) for process in processes))


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty home for Ray and us; its path is short because sockets lie below it. What was started there ends."""
    folder = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
    (folder / "run").mkdir(mode=0o700)
    try:
        yield folder
    finally:
        end_all(started_in(folder))
        shutil.rmtree(folder, ignore_errors=True)


def started_in(folder: Path) -> list[psutil.Process]:
    """Every process with this folder as Ray's temporary one, and what has sprung from these."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == str(folder):
                found |= {each.pid: each for each in [process, *process.children(recursive=True)]}
    return list(found.values())


def end_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def test_the_readmes_recipe_for_joining_works(home: Path) -> None:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (recipe,) = (block for block in blocks if "ray get-auth-token" in block)
    *before, down_line = recipe.splitlines()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # has the compiled kernels
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def shell(lines: list[str]) -> str:
        script = "\n".join(lines).replace("6379", port)
        with tempfile.TemporaryFile("w+") as out:  # not a pipe, which what runs on would keep open
            done = subprocess.run(
                ["bash", "-ec", script], env=environment, stdout=out, stderr=out, timeout=150, check=False
            )
            out.seek(0)
            said = out.read()
        assert done.returncode == 0, said
        assert "Traceback" not in said
        return said

    said = shell(before)
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (home / ".ray" / "auth_token").read_text() not in said
    target = re.search(r"^ready: embedded on (\S+)$", said, re.MULTILINE)[1]
    with Client(target) as client:
        assert len(client.generate("The king", max_tokens=4, ignore_eos=True).token_ids) == 4
        processes = client.stats().processes
    assert re.search(rf"^ending embedded on the Ray at \S+:{port}$", shell([down_line]), re.MULTILINE)
    eventually(lambda: not any(psutil.pid_exists(process.pid) for process in processes))


def test_a_service_that_was_ended_from_elsewhere_ends_its_serve(two_nodes: RayCluster) -> None:
    command = [TRAMONTANE, "serve", "--json", "--port", "0", "--address", two_nodes.address]
    process = subprocess.Popen(command, env=two_nodes.environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(json.loads(line)["event"] == "ready" for line in process.stdout)
    assert down(two_nodes) == (0, ["ending", "ended"])
    told, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert json.loads(told.splitlines()[-1])["message"] == "not serving: the service was ended from elsewhere"
