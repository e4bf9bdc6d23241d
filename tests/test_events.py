"""What operators and their programs read of `serve` and `down`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tramontane.cluster import following
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


OTHERS = """
import ctypes, os, sys
from tramontane.cluster.events import Events
events = Events.alone_on_stdout(as_json="--json" in sys.argv)
print("printed", flush=True)
os.write(1, b"written\\n")
libc = ctypes.CDLL(None)
libc.puts(b"from C")
libc.fflush(None)
os.system("echo from a child")
events.tell("ready", "ready: m", target="h:1")
events.tell("warning", "a warning")
"""
OTHERS_SAID = ["printed", "written", "from C", "from a child"]

UNREAD = """
import sys
from tramontane.cluster.events import Events
events = Events.alone_on_stdout(as_json=False)
events.tell("ready", "ready: m")
sys.stdin.read()
events.tell("warning", "a warning")
events.tell("ended", "ended")
"""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_others_print_goes_to_stderr(options):
    command = [sys.executable, "-c", OTHERS, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    out, err = done.stdout.splitlines(), done.stderr.splitlines()
    if options:
        assert [json.loads(line)["event"] for line in out] == ["ready", "warning"]
        assert err == OTHERS_SAID
    else:
        assert out == ["ready: m"]
        assert err == [*OTHERS_SAID, "a warning"]


@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"]])
def test_events_that_nobody_reads_are_dropped(closed):
    """As in `serve | head -1`, with and without `2>&1`."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", UNREAD], **pipes)
    assert process.stdout.readline() == b"ready: m\n"
    for name in closed:
        getattr(process, name).close()
    process.stdin.close()
    assert process.wait(60) == 0
    if "stderr" not in closed:
        assert process.stderr.read() == b"a warning\n", "nor does the interpreter complain at its end"


@pytest.mark.parametrize(("number", "out"), [(1, b""), (2, b"ready: m\nended\n")])
def test_a_stream_that_was_never_open_is_no_trouble(number, out):
    script = UNREAD.replace("sys.stdin.read()", "print('printed', flush=True)")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(number), timeout=60, check=True)
    assert done.stdout == out


def status(phase: ServicePhase, detail: str = "", lost_links: int = 0) -> Status:
    return Status(phase=phase, detail=detail, fraction=1.0, port=1, version="v", lost_links=lost_links)


READY, DEGRADED, BROKEN = ServicePhase.READY, ServicePhase.DEGRADED, ServicePhase.BROKEN
LOST = "gateway-0 has no link with router-0: cut"


def test_serve_says_how_a_service_comes_up_and_records_where_it_listens(monkeypatch, capsys):
    entrance = SimpleNamespace(host="127.0.0.1")
    spec = SimpleNamespace(name="m", entrance=entrance, context=64, context_lowered="")
    left = [
        None,
        status(ServicePhase.STARTING),
        status(ServicePhase.LOADING, "compiling the CPU kernels: once, some 15 s"),
        status(ServicePhase.LOADING, "compiling the CPU kernels: once, some 15 s"),
        status(ServicePhase.LOADING),
        status(READY),
    ]

    class Polled(contextlib.nullcontext):
        def latest(self):
            return left.pop(0)

    recorded = []
    record = SimpleNamespace(add=lambda **facts: recorded.append(facts))
    monkeypatch.setattr(following, "Poll", lambda *_: Polled(Polled()))
    monkeypatch.setattr(following, "POLL_S", 0.0)
    watch = SimpleNamespace(check=lambda: None)
    assert following.follow(None, spec, Events(as_json=True), threading.Event(), watch, record, owns_ray=True)
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == [
        "listening",
        "compiling",
        "loading",
        "ready",
    ]
    assert recorded == [{"target": "127.0.0.1:1"}]


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

    class Polled(contextlib.nullcontext):
        def latest(self):
            if len(left) == 1:
                ending.set()
            return left.pop(0)

        def silent_s(self):
            return 0.0

    monkeypatch.setattr(following, "Poll", lambda *_: Polled(Polled()))
    monkeypatch.setattr(following, "HOLD_POLL_S", 0.0)
    assert following.hold(None, None, Events(as_json=True), ending, SimpleNamespace(check=lambda: None)) is whole
    assert [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()] == told
