"""What operators and their programs read of `serve` and `down`."""

from __future__ import annotations

import json
import threading

import pytest

from tramontane.cluster import serve
from tramontane.cluster.controller import ServicePhase, Status
from tramontane.cluster.events import Events


def tell_all(events: Events) -> None:
    events.tell("starting", "starting Ray")
    events.tell("warning", "a file is open to others")
    events.tell("ready", "ready: m on h:1", target="h:1")
    events.tell("broken", "not serving: stage 1 died")


def test_people_get_lines_and_troubles_go_to_stderr(capsys):
    tell_all(Events(as_json=False))
    out, err = capsys.readouterr()
    assert out == "starting Ray\nready: m on h:1\n"
    assert err == "a file is open to others\nnot serving: stage 1 died\n"


def test_programs_get_all_events_in_their_order(capsys):
    tell_all(Events(as_json=True))
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in told] == ["starting", "warning", "ready", "broken"]
    assert told[2] == {"event": "ready", "message": "ready: m on h:1", "target": "h:1"}
    assert err == ""


def status(phase: ServicePhase, detail: str = "", lost_links: int = 0) -> Status:
    return Status(phase=phase, detail=detail, fraction=1.0, port=1, version="v", lost_links=lost_links)


READY, DEGRADED, BROKEN = ServicePhase.READY, ServicePhase.DEGRADED, ServicePhase.BROKEN
LOST = "gateway-0 has no link with router-0: cut"


@pytest.mark.parametrize(
    ("statuses", "told", "whole"),
    [
        ([status(READY)] * 2, [], True),
        (
            [status(READY), None, status(DEGRADED, LOST, 1), status(DEGRADED, LOST, 1), status(READY, LOST, 1)],
            [f"degraded: {LOST}", "serving again"],
            True,
        ),
        # The link was lost and linked again between two looks.
        ([status(READY), status(READY, LOST, 1), status(READY, LOST, 1)], [f"degraded: {LOST}", "serving again"], True),
        # What is broken is not degraded, and is said once.
        ([status(READY), status(BROKEN, "killed", 1), status(BROKEN, "killed", 1)], ["not serving: killed"], False),
        ([status(DEGRADED, LOST, 1), status(BROKEN, "killed", 1)], [f"degraded: {LOST}", "not serving: killed"], False),
    ],
    ids=["whole", "lost", "between", "broken", "both"],
)
def test_serve_says_what_becomes_of_a_service_that_was_ready(statuses, told, whole, monkeypatch, capsys):
    ending, left = threading.Event(), list(statuses)

    def next_status(controller, spec):
        if len(left) == 1:
            ending.set()
        return left.pop(0)

    monkeypatch.setattr(serve, "_status", next_status)
    monkeypatch.setattr(serve, "POLL_S", 0.0)
    assert serve._hold(None, None, Events(as_json=True), ending) is whole
    assert [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()] == told
