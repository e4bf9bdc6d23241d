"""Another user of the same machine, against a service that runs: he must not get between its parts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from service import Service, eventually
from strangers import STRANGER, hear, needs_root, stranger
from wires import socket_folder

from tramontane.client import Client
from tramontane.cluster import frames, handshake

pytestmark = pytest.mark.ray


@needs_root
def test_a_stranger_cannot_listen_in_a_part_s_place_at_start_or_at_a_controller_s_restart() -> None:
    service = Service("--stages", "2")
    try:
        marks = [service.identity, Path(service.ray_logs).parent.name]
        with stranger(lambda line: steal_sockets(marks, line)) as thief, Client(service.target) as client:
            first = client.generate("The king", max_tokens=8, seed=1, ignore_eos=True)
            controller = _controller(client)
            os.kill(controller, signal.SIGKILL)
            eventually(lambda: _controller(client) not in (0, controller), 60)
            again = client.generate("The king", max_tokens=8, seed=1, ignore_eos=True)
            assert again.token_ids == first.token_ids
            thief.send("enough")
            tried, achieved = hear(thief)
            assert len(tried) == 6, "two stages' sockets and the router's, by file and by folder"
            assert achieved == []
    finally:
        assert service.end() == 0, service.output


@needs_root
def test_a_folder_that_a_stranger_has_made_beforehand_is_refused() -> None:
    with socket_folder() as temporary:
        temporary.chmod(0o1777)
        his = temporary / f"tramontane-{os.geteuid()}"
        his.mkdir(mode=0o700)
        os.chown(his, STRANGER, STRANGER)
        service = Service("--stages", "1", environment={"TMPDIR": str(temporary), "XDG_RUNTIME_DIR": ""})
        assert service.process.wait(60) == 1
        service.wait_for(f"^Error: folder {his} has mode 700 and owner {STRANGER}; it must be 700 and 0")
        assert len(service.lines) == 1


def steal_sockets(marks: list[str], line: Connection) -> None:
    """Again and again, put listeners of one's own in the place of all sockets whose paths bear one of the marks.

    When something is said on the line, answers with what was tried, and with what was achieved.
    """
    tried, achieved = set(), []
    doors: list[socket.socket] = []
    over = False
    while not over:
        over = line.poll(0.1)
        entries = [entry.split()[-1] for entry in Path("/proc/net/unix").read_text().splitlines()]
        for path in {Path(entry) for entry in entries if any(mark in entry for mark in marks)}:
            for victim in (path, path.parent) if path.suffix == ".sock" else ():
                tried.add((str(path), str(victim)))
                with contextlib.suppress(OSError):
                    victim.rename(f"{victim}-away")
                    achieved.append(f"renamed {victim}")
                    path.parent.mkdir(exist_ok=True)
                    doors.append(_listen(path))
        for door in doors:
            with contextlib.suppress(OSError):
                caller, _ = door.accept()
                caller.settimeout(5)
                caller.sendall(b"".join(frames.encode(handshake.Greeter(b"a guess").challenge)))
                achieved.append(f"heard {caller.recv(1000)!r}")
    line.send((tried, achieved))


def _listen(path: Path) -> socket.socket:
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    path.chmod(0o777)
    door.listen()
    door.setblocking(False)
    return door


def _controller(client: Client) -> int:
    """Its process id; 0 where it does not answer."""
    with contextlib.suppress(Exception):
        return next((each.pid for each in client.stats().processes if each.role == "controller"), 0)
    return 0
