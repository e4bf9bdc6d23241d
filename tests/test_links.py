"""Blocking links over unix sockets and TCP: order, large payloads, ends of every kind."""

from __future__ import annotations

import queue
import socket
import tracemalloc

import numpy as np
import pytest
from wires import (
    DEADLINE_S,
    FAR,
    NEAR,
    SECRET,
    both_doors,
    dial,
    dialling_from,
    greet,
    in_thread,
    is_closed,
    is_unix,
    is_waiting,
    linked,
    listening,
    microbatch,
    open_descriptors,
    raw_dial,
    socket_folder,
    wait_until,
)

from tramontane.cluster import doors, frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.frames import FrameError
from tramontane.cluster.link import Link
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import PROTOCOL, Cancel, Challenge, Role, Welcome
from tramontane.stages.microbatch import Microbatch

PAYLOAD = 8 << 20


SILENCE_S = 0.25
LISTENER = handshake.Greeter(SECRET)


@pytest.fixture
def brisk(monkeypatch):
    """Heartbeats that are twenty times as fast."""
    monkeypatch.setattr(doors, "HEARTBEAT_PERIOD_S", 0.025)


@both_doors
def test_the_door_is_chosen_by_the_node(node):
    with socket_folder() as folder, listening(folder) as (listener, accepted):
        dial(listener.address, node=node, epoch=9, name="router-0").close()
        link, hello = accepted.get(timeout=DEADLINE_S)
        assert (hello.role, hello.name, hello.epoch) == (Role.ROUTER, "router-0", 9)
        assert (is_unix(link)) == (node == NEAR)
        link.close()


@both_doors
def test_messages_keep_their_order_in_both_directions(node):
    with linked(node) as ends:
        for sender, receiver in (ends, ends[::-1]):
            outcome = in_thread(lambda receiver=receiver: [receiver.receive().request for _ in range(500)])
            for number in range(500):
                sender.send(Cancel(request=number))
            assert outcome.get(timeout=DEADLINE_S) == list(range(500))


@both_doors
def test_rows_are_received_where_the_inbox_says(node):
    with linked(node) as (mine, theirs):
        rows = np.random.default_rng(0).integers(0, 255, PAYLOAD, np.uint8)
        inbox = np.zeros(PAYLOAD, np.uint8)
        asked = []

        def hand_out(message: Microbatch, size: int) -> memoryview:
            asked.append((message.step, len(message.tokens), size))
            return memoryview(inbox)

        outcome = in_thread(lambda: theirs.receive(hand_out))
        mine.send(microbatch(5, [1, 2, 3]), memoryview(rows))
        received = outcome.get(timeout=DEADLINE_S)
        assert (received.step, received.tokens.tolist()) == (5, [1, 2, 3])
        assert asked == [(5, 3, PAYLOAD)]
        assert np.array_equal(rows, inbox)


@both_doors
def test_block_tables_of_megabytes_arrive(node):
    with linked(node) as (mine, theirs):
        tokens = np.arange(1 << 20, dtype=np.int32)
        outcome = in_thread(theirs.receive)
        mine.send(microbatch(0, tokens))
        assert np.array_equal(outcome.get(timeout=DEADLINE_S).tokens, tokens)


@pytest.mark.parametrize("have", [PAYLOAD - 1, PAYLOAD + 1, 0])
def test_an_inbox_of_another_size_ends_the_link(have):
    with linked(NEAR) as (mine, theirs):
        outcome = in_thread(lambda: theirs.receive(lambda message, size: memoryview(bytearray(have))))
        in_thread(lambda: mine.send(microbatch(0, [1]), memoryview(bytes(PAYLOAD))))
        error = outcome.get(timeout=DEADLINE_S)
        assert isinstance(error, LinkClosed)
        assert f"rows: {PAYLOAD} bytes, the inbox has {have}" in str(error)


def test_rows_that_nobody_expects_end_the_link():
    with linked(NEAR) as (mine, theirs):
        mine.send(microbatch(0, [1]), memoryview(bytes(16)))
        with pytest.raises(LinkClosed, match="rows: 16 bytes, none are expected"):
            theirs.receive()


def test_an_inbox_that_fails_ends_the_link_and_says_why():
    def refuse(message: Microbatch, size: int) -> memoryview:
        raise ValueError("no room")

    with linked(NEAR) as (mine, theirs):
        mine.send(microbatch(0, [1]), memoryview(bytes(16)))
        with pytest.raises(ValueError, match="no room"):
            theirs.receive(refuse)
        with pytest.raises(LinkClosed, match="no room"):
            theirs.receive(refuse)
        with pytest.raises(LinkClosed):
            mine.receive()


def test_a_message_that_does_not_fit_leaves_the_link_as_it_was():
    with linked(NEAR) as (mine, theirs):
        with pytest.raises(FrameError):
            mine.send(Cancel(request="seven"))
        mine.send(Cancel(request=7))
        assert theirs.receive().request == 7


@both_doors
def test_close_wakes_a_blocked_receive(node):
    with linked(node) as (mine, theirs):
        outcome = in_thread(mine.receive)
        wait_until(lambda: is_waiting(mine))
        mine.close("time to go")
        assert str(outcome.get(timeout=DEADLINE_S)) == "time to go"
        with pytest.raises(LinkClosed, match="closed by the other end"):
            theirs.receive()
        with pytest.raises(LinkClosed, match="time to go"):
            mine.send(Cancel(request=1))


@both_doors
def test_close_wakes_a_blocked_send(node):
    with linked(node) as (mine, _):
        outcome = in_thread(lambda: mine.send(microbatch(0, [1]), memoryview(bytes(4 * PAYLOAD))))
        wait_until(lambda: is_waiting(mine))
        mine.close("time to go")
        assert str(outcome.get(timeout=DEADLINE_S)) == "time to go"
        mine.close("again")


@both_doors
def test_an_other_end_that_closes_mid_send_ends_the_send(node):
    with linked(node) as (mine, theirs):
        outcome = in_thread(lambda: mine.send(microbatch(0, [1]), memoryview(bytes(4 * PAYLOAD))))
        wait_until(lambda: is_waiting(mine))
        theirs.close()
        assert isinstance(outcome.get(timeout=DEADLINE_S), LinkClosed)


@both_doors
def test_links_and_listeners_leave_no_descriptors(node):
    before = open_descriptors()
    for _ in range(3):
        with linked(node) as (mine, theirs):
            mine.send(Cancel(request=1))
            theirs.receive()
            in_thread(theirs.receive)
    wait_until(lambda: open_descriptors() <= before)


@both_doors
@pytest.mark.usefixtures("brisk")
def test_an_idle_link_stays_open(node):
    with linked(node, silence_s=SILENCE_S) as (mine, theirs):
        outcome = in_thread(theirs.receive)
        in_thread(mine.receive)
        with pytest.raises(queue.Empty):
            outcome.get(timeout=1.0)  # four times the silence that ends a link
        mine.send(Cancel(request=3))
        assert outcome.get(timeout=DEADLINE_S).request == 3


@both_doors
@pytest.mark.parametrize("sent", [0, 5, 20], ids=["nothing", "half a prefix", "half a header"])
def test_a_peer_that_falls_silent_is_given_up(node, sent):
    with socket_folder() as folder, listening(folder, silence_s=SILENCE_S) as (listener, accepted):
        line = greet(raw_dial(listener.address, node))
        link, _ = accepted.get(timeout=DEADLINE_S)
        line.sendall(b"".join(frames.encode(Cancel(request=1)))[:sent])
        outcome = in_thread(link.receive)
        assert str(outcome.get(timeout=DEADLINE_S)) == "silent for 0.25 s"
        assert is_closed(line)
        line.close()


def test_tcps_own_limit_follows_the_silence():
    """A reader that is stopped leaves its window shut, and the kernel's limit would end the link before ours."""
    with linked(FAR, silence_s=7.0) as ends:
        for link in ends:
            assert link._line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


@both_doors
@pytest.mark.parametrize("size", [(1 << 17, 0, 0), (8, 1 << 27, 0), (8, 0, 1 << 31)], ids=["header", "arrays", "rows"])
def test_lengths_over_their_limits_are_refused_before_memory_is_taken(node, size):
    with socket_folder() as folder, listening(folder) as (listener, accepted):
        line = greet(raw_dial(listener.address, node))
        link, _ = accepted.get(timeout=DEADLINE_S)
        line.sendall(frames.PREFIX.pack(*size))
        tracemalloc.start()
        try:
            with pytest.raises(LinkClosed, match=r"not a frame: .* the limit is"):
                link.receive()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert is_closed(line)
        line.close()


@pytest.mark.parametrize("noise", [b"\xff" * 400, b"GET / HTTP/1.1\r\n\r\n" + bytes(2048)])
def test_noise_ends_the_link(noise):
    with socket_folder() as folder, listening(folder) as (listener, accepted):
        line = greet(raw_dial(listener.address, NEAR))
        link, _ = accepted.get(timeout=DEADLINE_S)
        line.sendall(noise)
        with pytest.raises(LinkClosed, match="not a frame"):
            link.receive()
        line.close()


def test_a_dialler_goes_away_from_what_is_no_listener_of_ours():
    for says, complaint in (
        (b"".join(frames.encode(Cancel(request=1))), "no challenge"),
        (b"".join(frames.encode(Challenge(protocol=PROTOCOL + 1, nonce=bytes(32)))), "speaks protocol"),
        (b"".join(frames.encode(Challenge(protocol=PROTOCOL, nonce=b""))), "no challenge"),
        (b"".join(frames.encode(LISTENER.challenge) + frames.encode(Cancel(request=1))), "no welcome"),
        (b"".join(frames.encode(LISTENER.challenge) + frames.encode(Welcome(proof=b""))), "another secret"),
        (b"220 mail.example.org ESMTP", "the limit is"),
        (b"", "closed by the other end"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = Address(node=NEAR, unix_path="", host="127.0.0.1", port=server.getsockname()[1])
            outcome = in_thread(lambda address=address: dial(address, node=FAR))
            line, _ = server.accept()
            line.sendall(says)
            if not says:
                line.close()
            error = outcome.get(timeout=DEADLINE_S)
            line.close()
        assert isinstance(error, LinkClosed)
        assert complaint in str(error)


def test_dialling_gives_up_on_a_listener_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(node=NEAR, unix_path="", host="127.0.0.1", port=server.getsockname()[1])
        with pytest.raises(LinkClosed, match="timed out"):
            Link.dial(address, dialling_from(FAR), role=Role.STAGE, name="s", epoch=1, timeout_s=0.2)


def test_dialling_where_nobody_listens_says_so():
    with socket_folder() as folder:
        path = str(folder / "nobody.sock")
        with pytest.raises(LinkClosed, match="cannot dial"):
            dial(Address(node=NEAR, unix_path=path, host="", port=0))
        with pytest.raises(LinkClosed, match="node near has no TCP door for node far"):
            dial(Address(node=NEAR, unix_path=path, host="", port=0), node=FAR)
