"""The records of services, and `down`, which ends the services that are recorded and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from fake_gcs import FakeGcs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tramontane.cluster.down import choose, has_ended
from tramontane.cluster.service_records import FoundRecord, RecordFile, ServiceRecord, read_records, remove_ended

TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))
RECORD = ServiceRecord(
    identity="5e", name="embedded", ray="127.0.0.1:6379", owns_ray=True, namespace="tramontane", pid=os.getpid()
)
SERVE = """
import os, pathlib, signal, sys
from tramontane.cluster.service_records import RecordFile, ServiceRecord
record = ServiceRecord(identity=sys.argv[2], name=sys.argv[3], ray="127.0.0.1:6379", owns_ray=True,
                       namespace="tramontane", pid=os.getpid())
file = RecordFile(pathlib.Path(sys.argv[1]), record)
file.add(target="127.0.0.1:" + sys.argv[4])
signal.signal(signal.SIGTERM, lambda *_: (file.close(remove=True), os._exit(0)))
print("recorded", flush=True)
while True:
    signal.pause()
"""
"""Stands for `serve`: records a service and ends on SIGTERM."""


@pytest.fixture
def session(tmp_path, monkeypatch) -> Path:
    """The user's runtime folder."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def services(session) -> Path:
    folder = session / "tramontane" / "services"
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700)
    return folder


@pytest.fixture
def serve(services) -> Iterator:
    """Starts processes that stand for `serve`."""
    started: list[subprocess.Popen[str]] = []

    def start(identity: str, name: str, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVE, str(services), identity, name, str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "recorded\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(30)
        process.stdout.close()


def down(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAMONTANE, "down", *arguments], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [json.loads(line)["event"] for line in done.stdout.splitlines()]


def test_a_record_is_this_users_alone_and_names_who_holds_it(services, serve):
    process = serve("5e", "embedded", 50051)
    (path,) = services.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    ((found,), flaws) = read_records(services)
    assert found == FoundRecord(path, replace(RECORD, pid=process.pid, target="127.0.0.1:50051"), process.pid)
    assert not flaws
    process.kill()
    process.wait(30)
    assert read_records(services)[0][0].holder is None


def test_a_record_may_grow(services):
    written = {**RECORD.__dict__, "admin": {"target": "127.0.0.1:9", "token": "t"}}
    (services / "5e.json").write_text(json.dumps(written))
    assert [found.record for found in read_records(services)[0]] == [RECORD]


def test_what_is_left_of_services_that_had_a_ray_of_their_own_goes(services, serve):
    serve("1", "living", 1)
    for identity, owns_ray in [("2", True), ("3", False)]:
        RecordFile(services, replace(RECORD, identity=identity, owns_ray=owns_ray)).close(remove=False)
    remove_ended(services)
    assert sorted(path.stem for path in services.iterdir()) == ["1", "3"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=64) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_bytes_of_a_record_are_more_than_a_line(services, written):
    (services / "5e.json").write_bytes(written if isinstance(written, bytes) else written.encode())
    found, flaws = read_records(services)
    assert (found, len(flaws)) == ([], 1)
    assert "\n" not in flaws[0]


@pytest.mark.parametrize("change", [{"pid": "7"}, {"owns_ray": 1}, {"identity": None}, {"name": ...}])
def test_a_record_with_a_wrong_field_is_none(services, change):
    written = {name: value for name, value in {**RECORD.__dict__, **change}.items() if value is not ...}
    (services / "5e.json").write_text(json.dumps(written))
    found, (flaw,) = read_records(services)
    assert not found
    assert next(iter(change)) in flaw


def test_down_ends_the_one_service_and_names_it(serve):
    process = serve("5e", "embedded", 50051)
    done = down()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ending embedded on 127.0.0.1:50051 (5e, a Ray of its own)\nended in ")
    assert process.wait(30) == 0
    done = down("--json")
    assert (done.returncode, told(done)) == (1, ["nothing"])


def test_down_asks_which_where_several_run(serve):
    first, second = serve("1", "embedded", 50051), serve("2", "embedded", 50052)
    done = down()
    assert done.returncode == 1
    assert done.stderr == (
        "Error: 2 services run here, say which by `tramontane down ID`: "
        "embedded on 127.0.0.1:50051 (1, a Ray of its own); embedded on 127.0.0.1:50052 (2, a Ray of its own)\n"
    )
    assert first.poll() is second.poll() is None
    assert down("127.0.0.1:50052").returncode == 0
    assert second.wait(30) == 0
    assert first.poll() is None


def test_down_removes_what_is_over_and_ends_nothing_else(services):
    RecordFile(services, replace(RECORD, pid=1)).close(remove=False)  # the number is another process's by now
    done = down("--json")
    assert (done.returncode, told(done)) == (1, ["over", "nothing"])
    assert not list(services.iterdir())


def test_a_holder_that_cannot_be_seen_is_not_guessed(services, serve):
    """As in another container with the same runtime folder, where the record's number is somebody else's here."""
    from tramontane.cluster import down as ending
    from tramontane.cluster.events import Events

    process = serve("5e", "embedded", 50051)
    ((found,), _) = read_records(services)
    for holder in (0, os.getpid()):
        with pytest.raises(ConnectionError, match="is not to be seen here"):
            ending.end_serve(replace(found, holder=holder), holder, Events(as_json=False))
    assert process.poll() is None


def test_a_service_that_was_left_running_is_told_from_one_that_is_over(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    record = msgpack.packb({"identity": "5e", "name": "embedded"})

    def left(address: str, identity: str = "5e") -> FoundRecord:
        return FoundRecord(Path("5e.json"), replace(RECORD, identity=identity, owns_ray=False, ray=address), None)

    with FakeGcs(record=record) as gcs:
        assert not has_ended(left(gcs.address))
        assert has_ended(left(gcs.address, identity="of an earlier service"))
    assert has_ended(left(gcs.address))
    with FakeGcs(token="another") as gcs:
        assert not has_ended(left(gcs.address)), "it may still be there"


def test_which_service_is_meant():
    one, two = (
        FoundRecord(Path(f"{n}.json"), replace(RECORD, identity=f"{n}", name=f"model-{n}", target=f"h:{n}"), 1)
        for n in (1, 2)
    )
    for words, meant in [(("1", "model-1", "h:1"), one), (("2", "model-2", "h:2"), two)]:
        assert all(choose([one, two], word) is meant for word in words)
    assert choose([one], None) is one
    with pytest.raises(ValueError, match=r"^no service three runs here; there is model-1 on h:1 \(1, .*\); model-2"):
        choose([one, two], "three")
