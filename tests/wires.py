"""Ends of links for tests: a listener that keeps what dials, raw sockets that misbehave, counts of descriptors."""

from __future__ import annotations

import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tramontane.cluster import frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.link import Link
from tramontane.cluster.listener import Listener
from tramontane.cluster.messages import Hello, Role
from tramontane.cluster.site import Site
from tramontane.stages.microbatch import BlockTable, Microbatch, SampledRows, no_scored_rows

DEADLINE_S = 20.0
SECRET = b"of the tests"
NEAR, FAR = "near", "far"
"""Nodes: the listeners' own, and another, from which one dials TCP."""
both_doors = pytest.mark.parametrize("node", [NEAR, FAR])


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A private one whose path is short, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="tw") as folder:
        yield Path(folder)


def site_at(folder: Path, **changes: object) -> Site:
    """Where listeners stand: on NEAR, with both doors."""
    return Site(**{"node": NEAR, "sockets": folder, "secret": SECRET, "host": "127.0.0.1", **changes})


def dialling_from(node: str, **changes: object) -> Site:
    """Where one stands that only dials."""
    return site_at(Path("/nowhere"), node=node, host=None, **changes)


@contextmanager
def listening(folder: Path, *, name: str = "door", **changes: object) -> Iterator[tuple[Listener, Accepted]]:
    accepted: Accepted = queue.Queue()
    listener = Listener(name, site_at(folder, **changes), lambda link, hello: accepted.put((link, hello)))
    try:
        yield listener, accepted
    finally:
        listener.close()
        while not accepted.empty():
            accepted.get()[0].close()


Accepted = queue.Queue[tuple[Link, Hello]]


def dial(address: Address, *, node: str = NEAR, epoch: int = 1, name: str = "tester", **changes: object) -> Link:
    site = dialling_from(node, **changes)
    return Link.dial(address, site, role=Role.ROUTER, name=name, epoch=epoch, timeout_s=DEADLINE_S)


@contextmanager
def linked(node: str, **changes: object) -> Iterator[tuple[Link, Link]]:
    """Both ends of one link, over a unix socket for NEAR and over TCP for FAR."""
    with socket_folder() as folder, listening(folder, **changes) as (listener, accepted):
        mine = dial(listener.address, node=node, **changes)
        theirs, _ = accepted.get(timeout=DEADLINE_S)
        try:
            yield mine, theirs
        finally:
            mine.close()
            theirs.close()


def raw_dial(address: Address, node: str) -> socket.socket:
    """A dialler that does as it likes."""
    if node == NEAR:
        line = socket.socket(socket.AF_UNIX)
        line.connect(address.unix_path)
    else:
        line = socket.create_connection((address.host, address.port))
    line.settimeout(DEADLINE_S)
    return line


def greet(line: socket.socket, **changes: object) -> socket.socket:
    """Do the dialler's part of the handshake by hand; with a changed Hello, only up to it."""
    dialler = handshake.Dialler(role=Role.STAGE, name="raw", epoch=1, secret=SECRET)
    hello = dialler.answer(read_frame(line))
    line.sendall(b"".join(frames.encode(Hello(**{**vars(hello), **changes}))))
    if not changes:
        dialler.check(read_frame(line))
    return line


def read_frame(line: socket.socket) -> frames.Message:
    prefix = frames.parse_prefix(_exactly(line, frames.PREFIX.size))
    header = _exactly(line, prefix.header)
    return frames.decode(header, _exactly(line, prefix.arrays))


def is_closed(line: socket.socket) -> bool:
    """Waits for the other end to close; what it still says is thrown away."""
    try:
        while line.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def is_waiting(link: Link) -> bool:
    """Some thread is inside a system call on the link."""
    return link._users > 0


def is_unix(link: Link) -> bool:
    return link._line.family == socket.AF_UNIX


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        assert more, f"closed after {len(data)} of {count} bytes"
        data += more
    return data


def in_thread(job: Callable[[], object]) -> queue.Queue[object]:
    """Run it; its result or exception comes in the queue."""
    outcome: queue.Queue[object] = queue.Queue()

    def run() -> None:
        try:
            outcome.put(job())
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def microbatch(step: int, tokens: list[int] | np.ndarray, *, epoch: int = 1) -> Microbatch:
    """One piece, whose last row is sampled."""
    one, none = np.ones(1, np.int32), np.empty(0, np.int32)
    return Microbatch(
        epoch=epoch,
        step=step,
        tokens=np.asarray(tokens, np.int32),
        first=0 * one,
        length=one * len(tokens),
        sequence=np.array([7], np.int64),
        tables=(BlockTable(blocks=one, held=one, fresh=none),),
        sampled=SampledRows(
            row=one * (len(tokens) - 1),
            temperature=np.zeros(1, np.float32),
            top_k=0 * one,
            top_p=np.ones(1, np.float32),
            min_p=np.zeros(1, np.float32),
            seed=np.ones(1, np.uint64),
            banned=none,
            banned_count=0 * one,
        ),
        scored=no_scored_rows(),
    )
