"""Server-sent events: the specification's own examples, however the stream is cut, and what is too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.client.loadtest.generator.server_sent_events import EVENT_LIMIT_BYTES, Event, EventReader


def read(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event(b"", b"YHOO\n+2\n10")]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n", [b"first event", b"second event"]),
        (b"data:  third event\n\n", [b" third event"]),
        (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
        (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
        (b"event: add\ndata: 73857293\n\nevent: lost\n\ndata: x\n\n", [Event(b"add", b"73857293"), b"x"]),
        (b"retry: 3\nwhatever: 7\n: \n\n", []),
        (b"data: one\r\ndata: two\r\n\r\n", [b"one\ntwo"]),
        (
            b"\xef\xbb\xbfdata: after a mark\r\n\r\ndata: by CR\r\rdata: by all\r\n\n",
            [b"after a mark", b"by CR", b"by all"],
        ),
    ],
)
def test_the_specifications_examples(stream, events):
    expected = [Event(b"", each) if isinstance(each, bytes) else each for each in events]
    assert read(stream) == expected
    assert read(*(stream[place : place + 1] for place in range(len(stream)))) == expected


pieces = st.lists(
    st.sampled_from([b"data: a", b"data:", b"event: e", b": c", b"\n", b"\r", b"\r\n", b"\n\n", b"x", b"\xff", b""])
)


@given(pieces)
def test_events_are_the_same_however_the_stream_is_cut(pieces):
    assert read(*pieces) == read(b"".join(pieces))


def test_an_event_that_no_blank_line_ends_is_told_at_the_end():
    reader = EventReader()
    assert list(reader.feed(b"data: [DONE]")) == []
    assert list(reader.end()) == [Event(b"", b"[DONE]")]


@pytest.mark.parametrize(
    "stream",
    [b"data: " + b"x" * EVENT_LIMIT_BYTES, b"x" * (EVENT_LIMIT_BYTES + 1), b"data:\n" * (EVENT_LIMIT_BYTES + 2)],
)
def test_an_endless_event_is_given_up(stream):
    with pytest.raises(ValueError, match="an event is longer than 1,048,576 bytes"):
        read(stream, b"more than that\n")
