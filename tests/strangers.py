"""Another user of this machine, for tests that need root: what he tries is done in a process of his own."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar, cast

import pytest

from tramontane.cluster import frames, handshake

STRANGER = 65534
"""`nobody`."""
DEADLINE_S = 20.0
F = TypeVar("F", bound=Callable[..., object])


def needs_root(test: F) -> F:
    """Marks a test that only root can run."""
    skip = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which only root can")
    return cast(F, pytest.mark.root(skip(test)))


@contextmanager
def stranger(job: Callable[[Connection], object]) -> Iterator[Connection]:
    """Runs `job` as another user with one end of a pipe; ours is the other. It is ended on leaving."""
    ours, his = multiprocessing.Pipe()

    def run() -> None:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        job(his)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    his.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def hear(line: Connection) -> object:
    """What he says next."""
    assert line.poll(DEADLINE_S), "the stranger says nothing"
    return line.recv()


def knock(path: str) -> bytes:
    """What a listener says to whoever comes."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        return line.recv(100)


def listen_as_one_of_us(path: str, told: Connection) -> None:
    """Challenge whoever dials, and tell what he answers."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        os.chmod(path, 0o777)
        door.listen()
        told.send("listening")
        line, _ = door.accept()
        try:
            line.sendall(b"".join(frames.encode(handshake.Greeter(b"a guess").challenge)))
            told.send(line.recv(1000))
        except ConnectionError:  # the dialler has gone already
            told.send(b"")
