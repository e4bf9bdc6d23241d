"""The whole path, as users and operators meet it: `tramontane serve` over real Ray, and gRPC clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from models import load_tensors
from reference_model import greedy
from service import Service, eventually

from tramontane.client import (
    AsyncClient,
    Client,
    ClientOptions,
    DeadlineExceeded,
    HealthStatus,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from tramontane.cluster.private_folder import sockets_folder
from tramontane.stages.config import ModelConfig

pytestmark = pytest.mark.ray

VERSE = "The wind that from the northern mountain falls\nHath swept the harbour clean of idle sail,\n"


@pytest.fixture
def client(service: Service):
    with Client(service.target) as client:
        yield client


def running(process: psutil.Process) -> bool:
    """Neither ended nor a zombie that waits for its parent to look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def idle(client: Client) -> bool:
    """Nothing runs, nothing waits, no block is held."""
    (router,) = client.stats().routers
    return not (router.running or router.waiting or router.in_flight_microbatches or any(router.kv_blocks_used))


def test_text_streams_and_is_what_the_unary_call_says(client: Client) -> None:
    with client.stream("ROMEO:\n", max_tokens=40, temperature=0) as stream:
        deltas = list(stream)
    whole = client.generate("ROMEO:\n", max_tokens=40, temperature=0)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert len(deltas) > 1
    assert whole.usage.completion_tokens == len(whole.token_ids) == 40


def test_a_seed_gives_the_same_again_and_is_told_where_unset(client: Client) -> None:
    first = client.generate("The king", max_tokens=24)
    again = client.generate("The king", max_tokens=24, seed=first.seed)
    other = client.generate("The king", max_tokens=24, seed=first.seed + 1)
    assert again.token_ids == first.token_ids
    assert other.token_ids != first.token_ids


def test_two_stages_over_ray_say_what_the_dumb_reference_says(service: Service, client: Client, embedded_dir) -> None:
    prompt = client.tokenize(VERSE)
    expected = greedy(load_tensors(embedded_dir), ModelConfig.load(embedded_dir), list(prompt), 12)
    assert list(client.generate(VERSE, max_tokens=12, temperature=0, ignore_eos=True).token_ids) == expected


async def test_many_users_at_once_get_what_each_gets_alone(service: Service) -> None:
    prompts = ["KING:\n", "The", VERSE, VERSE * 4, VERSE * 12, "DUKE:\nWhat", "O, my", VERSE * 8 + "KING:\n"]
    async with AsyncClient(service.target) as client:
        together = await asyncio.gather(
            *(client.generate(prompt, max_tokens=32, temperature=0) for prompt in prompts * 2)
        )
        alone = [await client.generate(prompt, max_tokens=32, temperature=0) for prompt in prompts]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone] * 2


def test_leaving_a_stream_frees_everything(client: Client) -> None:
    for _ in range(3):
        with client.stream(VERSE * 8, max_tokens=2000, ignore_eos=True) as stream:
            next(iter(stream))
    eventually(lambda: idle(client))


def test_a_deadline_frees_everything(client: Client) -> None:
    """A service that knows what steps cost refuses what is hopeless; here it takes a completion for a shorter one."""
    with pytest.raises((DeadlineExceeded, ResourceExhausted)):
        client.generate(VERSE, max_tokens=3000, ignore_eos=True, timeout_s=0.5)
    with contextlib.suppress(DeadlineExceeded, ResourceExhausted):
        client.generate(VERSE, max_tokens=100, ignore_eos=True, timeout_s=0.5)
    eventually(lambda: idle(client))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 99_999]}, "99999"),
        ({"prompt": [5] * 4096}, "4096"),
        ({"prompt": "x", "max_tokens": 5000}, "5000"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stop": [""]}, "stop"),
    ],
)
def test_bad_input_is_named_and_the_next_request_served(client: Client, options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        client.generate(options.pop("prompt"), **options)
    assert named in str(refusal.value)
    assert len(client.generate("The", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_another_models_name_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="nobody"):
        client.generate("x", model="nobody")


def test_malformed_protobuf_is_the_callers_mistake(service: Service, client: Client) -> None:
    with grpc.insecure_channel(service.target) as channel:
        call = channel.unary_unary("/tramontane.v1.Serving/Generate")
        with pytest.raises(grpc.RpcError) as refusal:
            call(b"\xff\xff\xff", timeout=10)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.generate("The", max_tokens=2).text is not None


def test_models_health_and_stats(client: Client) -> None:
    (model,) = client.models()
    assert (model.name, model.stages, model.window_tokens, model.context_tokens) == ("embedded", 2, 128, 4096)
    assert client.health() is HealthStatus.SERVING
    assert client.health("tramontane.v1.Serving/embedded") is HealthStatus.SERVING
    stats = client.stats()
    assert sorted((process.role, process.name) for process in stats.processes) == [
        ("controller", "0"),
        ("gateway", "0"),
        ("router", "0"),
        ("stage", "0.0"),
        ("stage", "0.1"),
    ]
    assert all(psutil.pid_exists(process.pid) for process in stats.processes)
    assert all(stage.busy_ns > 0 for stage in stats.stages)
    (gateway,) = stats.gateways
    assert (gateway.name, gateway.tokenizing_bytes) == ("0", 0)
    assert gateway.open_calls >= 1, "this very call is open, and watching health may be"
    assert gateway.longest_stall_ms >= gateway.recent_stall_ms >= gateway.recent_own_stall_ms


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = Service("--port", str(port))
        assert refused.process.wait(90) == 1
        assert f"127.0.0.1:{port}" in refused.output


def test_a_wrong_directory_is_named(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("tramontane"), "serve", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "config.json" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_more_than_the_machine_has_is_said() -> None:
    refused = Service("--stages", "2", "--cpus-per-stage", "4096")
    refused.wait_for("no room for the pipeline: 2 stages ask for 4096 CPU each", timeout_s=90)
    assert refused.process.wait(60) == 1


def test_the_port_opens_before_loading_and_a_killed_serve_leaves_nothing() -> None:
    killed = Service("--stages", "1")
    with Client(killed.wait_for(r"^listening on (\S+),")[1], ClientOptions(wait=False)) as client:
        seen = {client.health()}
        assert killed.target
        seen.add(client.health())
        assert seen == {HealthStatus.NOT_SERVING, HealthStatus.SERVING}
        processes = [psutil.Process(process.pid) for process in client.stats().processes]
    processes += psutil.Process(killed.process.pid).children(recursive=True)
    killed.process.kill()
    eventually(lambda: not any(running(process) for process in processes), 60)


def test_ctrl_c_leaves_nothing_behind() -> None:
    ended = Service("--stages", "1")
    with Client(ended.target) as client:
        processes = [psutil.Process(process.pid) for process in client.stats().processes]
    children = psutil.Process(ended.process.pid).children(recursive=True)
    os.killpg(ended.process.pid, signal.SIGINT)  # as a terminal sends it: to everything in the foreground
    assert ended.end() == 0, ended.output
    eventually(lambda: not any(running(process) for process in [*processes, *children]))
    assert not sockets_folder(ended.identity).exists()
    session = Path(ended.ray_logs).parent
    assert session.name.startswith("session_")
    assert not session.exists()
    assert {path.name for path in Path(ended.logs).iterdir()} == {
        *("controller.log", "gateway-0.log", "router-0.log", "stage-0.0.log")
    }


def test_all_of_it_listens_on_loopback_only(service: Service) -> None:
    serve = psutil.Process(service.process.pid)
    sockets = [socket for each in [serve, *serve.children(recursive=True)] for socket in each.net_connections("inet")]
    listening = {socket.laddr.ip for socket in sockets if not socket.raddr}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
