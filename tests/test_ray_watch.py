"""When Ray counts as gone: by refused connections and by silence, each with its own patience."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from service import eventually

from tramontane.cluster.ray_watch import GCS_LIMIT_S, RayGone, RayWatch, Refusals, Servers, what_is_gone


@pytest.mark.parametrize(
    ("refusals", "silent_s", "gcs_may_return", "said"),
    [
        (None, 0.0, False, ""),
        (Refusals(gcs=False, raylet=False), GCS_LIMIT_S - 1, False, ""),
        (Refusals(gcs=False, raylet=False), GCS_LIMIT_S, False, "Ray's GCS has not answered for 45 s"),
        (Refusals(gcs=False, raylet=False), GCS_LIMIT_S, True, "Ray's GCS has not answered for 45 s"),
        (Refusals(gcs=True, raylet=False), 0.0, False, "Ray's GCS is gone"),
        (Refusals(gcs=True, raylet=False), GCS_LIMIT_S - 1, True, ""),
        (Refusals(gcs=True, raylet=False), GCS_LIMIT_S + 1, True, "Ray's GCS has not answered for 46 s"),
        (Refusals(gcs=False, raylet=True), 0.0, False, "the raylet of this node is gone"),
        (Refusals(gcs=True, raylet=True), 0.0, True, "the raylet of this node is gone"),
    ],
)
def test_what_is_gone(refusals, silent_s, gcs_may_return, said):
    assert what_is_gone(refusals, silent_s, gcs_may_return=gcs_may_return) == said


@pytest.fixture
def ports() -> Iterator[list[socket.socket]]:
    """In place of the GCS and of the raylet."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    yield sockets
    for each in sockets:
        each.close()


def watched(ports, ask=lambda: None, *, gcs_may_return=False, now=lambda: 0.0) -> RayWatch:
    gcs, raylet = (port.getsockname() for port in ports)
    return RayWatch(Servers(gcs, raylet), ask, gcs_may_return=gcs_may_return, now=now)


def gone(watch: RayWatch) -> str:
    try:
        watch.check()
    except RayGone as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("number", "said"), [(0, "Ray's GCS is gone"), (1, "the raylet of this node is gone")])
def test_a_port_that_refuses_is_noticed(ports, number, said):
    with watched(ports) as watch:
        eventually(lambda: watch._refusals.latest() == Refusals(gcs=False, raylet=False))
        assert gone(watch) == ""
        ports[number].close()
        eventually(lambda: gone(watch) == said)


def test_a_gcs_that_answers_no_more_is_noticed_at_the_limit(ports):
    """It accepts connections, as a stopped one does, and whoever asks it fails."""
    clock, answers = [0.0], [True]

    def ask() -> None:
        if not answers[0]:
            raise TimeoutError

    with watched(ports, ask, gcs_may_return=True, now=lambda: clock[0]) as watch:
        eventually(lambda: watch._gcs.latest() is True)
        answers[0] = False
        clock[0] = GCS_LIMIT_S - 1
        assert gone(watch) == ""
        answers[0] = True  # it was a pause
        eventually(lambda: watch._gcs.silent_s() == 0.0)
        answers[0] = False
        clock[0] = 2 * GCS_LIMIT_S
        assert gone(watch) == "Ray's GCS has not answered for 46 s"
