"""`tramontane serve` with TLS and tokens, open to other machines, and its events as JSON: one service for all of it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from certificates import Authority
from service import Service

from tramontane.client import Client, ClientOptions, Tls, Unauthenticated
from tramontane.cluster.private_folder import sockets_folder

pytestmark = pytest.mark.ray

TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))
TOKEN, LATER = "sesame-of-ann-0001", "sesame-of-bob-0002"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("secured")


@pytest.fixture(scope="module")
def events(folder) -> Iterator[list[dict]]:
    """What a service says until it is ready; it runs as long as the tests of this file."""
    cert, key = Authority(folder).issue("server")
    (folder / "tokens").write_text(f"# of Ann\n{TOKEN}\n")
    service = Service(
        *("--host", "0.0.0.0", "--dtype", "float32", "--json"),
        *("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(folder / "tokens")),
    )
    try:
        service.wait_for(r'"event": "ready"')
        told = [json.loads(line) for line in service.lines]
        yield told
        told += [json.loads(line) for line in service.lines[len(told) :]]
    finally:
        assert service.end() == 0, service.output
    last = [json.loads(line)["event"] for line in service.lines[-2:]]
    assert last == ["ending", "ended"]


@pytest.fixture(scope="module")
def target(events) -> str:
    host, _, port = events[-1]["target"].rpartition(":")
    assert host == "0.0.0.0"
    return f"127.0.0.1:{port}"


def test_events_are_json_one_a_line(events, folder):
    names = [event["event"] for event in events]
    assert [name for name in dict.fromkeys(names) if name not in ("waiting", "loading")] == [
        *("warning", "starting", "model", "memory", "kv", "logs", "listening", "kernels", "ready")
    ]
    assert f"--token-file is {folder / 'tokens'}, which others" in events[0]["message"]
    assert events[-1]["version"]


def test_a_token_over_tls_is_served_and_others_are_not(target, folder):
    tls = Tls(ca=folder / "authority.pem")
    with Client(target, ClientOptions(tls=tls, token=TOKEN)) as client:
        assert client.generate("ROMEO:", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
        assert len(client.stats().stages) == 1
    for token in (None, LATER):
        with Client(target, ClientOptions(tls=tls, token=token)) as client, pytest.raises(Unauthenticated):
            client.generate("ROMEO:", max_tokens=4)
    (folder / "tokens").write_text(f"{TOKEN}\n{LATER}\n")
    with Client(target, ClientOptions(tls=tls, token=LATER)) as client:
        assert client.models()


def test_the_command_line_gets_in_too(target, folder):
    def run(verb: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [TRAMONTANE, verb, "--target", target, "--ca", str(folder / "authority.pem"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert run("health").stdout == "SERVING\n"
    refused = run("models")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "a bearer token is missing" in refused.stderr
    (folder / "mine").write_text(TOKEN)
    assert run("models", "--token-file", str(folder / "mine")).stdout.startswith("NAME")


def test_a_flood_of_calls_that_are_refused_leaves_few_lines_and_none_of_its_own(target, folder, events):
    """They would write 10 MB a second."""
    credentials = grpc.ssl_channel_credentials((folder / "authority.pem").read_bytes())
    with grpc.secure_channel(target, credentials) as channel:
        call = channel.unary_unary("/x\n2026-01-01 00:00:00,000 I tramontane: forged\x1b[2J")
        answers = [call.future(b"") for _ in range(500)]
        assert {answer.code() for answer in answers} == {grpc.StatusCode.UNAUTHENTICATED}
    log = Path(next(event["folder"] for event in events if event["event"] == "logs"), "gateway-0.log").read_text()
    refused = [line for line in log.split("\n") if "UNAUTHENTICATED" in line]
    assert 0 < len(refused) < 300
    assert r"'/x\n2026-01-01 00:00:00,000 I tramontane: forged\x1b[2J'" in refused[-1]
    assert all(line.isprintable() for line in log.split("\n"))


def test_no_process_and_no_log_shows_a_token_or_the_secret_of_the_links(events):
    told = next(event for event in events if event["event"] == "logs")
    secret = (sockets_folder(Path(told["folder"]).name) / "secret").read_bytes()
    hidden = [b"sesame", secret, secret.hex().encode(), repr(secret)[2:-1].encode(), base64.b64encode(secret)]
    for process in psutil.process_iter():
        try:
            shown = "\n".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue
        assert not any(each in shown.encode(errors="surrogateescape") for each in hidden), process
    files = [path for folder in ("folder", "ray") for path in Path(told[folder]).rglob("*.*") if path.is_file()]
    assert len(files) > 4
    for path in files:
        content = path.read_bytes()
        assert not any(each in content for each in hidden), path
