"""What operators and their programs read of `serve` and `down`."""

from __future__ import annotations

import json

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
