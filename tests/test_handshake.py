"""Who gets a link: doors that strangers cannot enter, and a handshake that they do not pass."""

from __future__ import annotations

import os
import re
import socket

import pytest
from wires import (
    DEADLINE_S,
    NEAR,
    both_doors,
    dial,
    greet,
    is_closed,
    listening,
    open_descriptors,
    raw_dial,
    read_frame,
    socket_folder,
    wait_until,
)

from tramontane.cluster import doors, frames, handshake, listener
from tramontane.cluster.link import LinkClosed
from tramontane.cluster.listener import Listener
from tramontane.cluster.messages import PROTOCOL, Cancel, Challenge, Hello, Role

SECRET = b"correct horse battery staple"


def hello(**changes):
    return Hello(**{"protocol": PROTOCOL, "role": Role.STAGE, "name": "s", "epoch": 1, "proof": b"", **changes})


def still_welcomes(door, accepted, secret=b""):
    """The next dialler gets in."""
    dial(door.address, secret=secret, name="honest").close()
    link, greeting = accepted.get(timeout=DEADLINE_S)
    link.close()
    return greeting.name == "honest"


@both_doors
def test_the_secret_opens_the_door(node):
    with socket_folder() as folder, listening(folder, secret=SECRET) as (door, accepted):
        with_secret = dial(door.address, node=node, secret=SECRET)
        link, _ = accepted.get(timeout=DEADLINE_S)
        with_secret.send(Cancel(request=1))
        assert link.receive().request == 1
        with_secret.close()
        link.close()


@both_doors
@pytest.mark.parametrize("wrong", [b"", b"a guess", SECRET + b"!"])
def test_another_secret_is_refused_and_not_told(node, wrong, caplog):
    with socket_folder() as folder, listening(folder, secret=SECRET) as (door, accepted):
        stranger = dial(door.address, node=node, secret=wrong, name="mallory")
        with pytest.raises(LinkClosed, match="closed by the other end"):
            stranger.receive()
        assert accepted.empty()
        assert still_welcomes(door, accepted, SECRET)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["door refused a dialler: 'mallory' has another secret"]


def test_a_proof_where_no_secret_is_set_is_refused(caplog):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        with pytest.raises(LinkClosed):
            dial(door.address, secret=SECRET).receive()
        assert still_welcomes(door, accepted)
    assert "has another secret" in caplog.text


def test_a_proof_seen_before_is_worth_nothing():
    with socket_folder() as folder, listening(folder, secret=SECRET) as (door, accepted):
        line = raw_dial(door.address, NEAR)
        old = handshake.answer(read_frame(line), role=Role.STAGE, name="s", epoch=1, secret=SECRET)
        line.close()
        line = raw_dial(door.address, NEAR)
        greet(line, proof=old.proof)
        assert is_closed(line)
        line.close()
        assert still_welcomes(door, accepted, SECRET)


@both_doors
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            Hello(protocol=PROTOCOL + 1, role=Role.STAGE, name="s", epoch=1, proof=b""),
            f"it speaks protocol {PROTOCOL + 1}, here is {PROTOCOL}",
        ),
        (Cancel(request=1), "its first message is no hello"),
        (Challenge(protocol=PROTOCOL, nonce=bytes(32)), "its first message is no hello"),
        (
            Hello(protocol=PROTOCOL, role=Role.STAGE, name="s" * 2000, epoch=1, proof=b""),
            "header: .* the limit is 1024",
        ),
    ],
    ids=["protocol", "message", "challenge", "long"],
)
def test_another_answer_is_refused_with_one_line(node, answer, complaint, caplog):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        line = raw_dial(door.address, node)
        assert isinstance(read_frame(line), Challenge)
        line.sendall(b"".join(frames.encode(answer)))
        assert is_closed(line)
        line.close()
        assert still_welcomes(door, accepted)
    (record,) = caplog.records
    assert re.fullmatch(f"door refused a dialler: {complaint}", record.getMessage())


@both_doors
@pytest.mark.parametrize("size", [(1 << 30, 0, 0), (8, 1 << 20, 0), (8, 0, 8)], ids=["header", "arrays", "rows"])
def test_strangers_get_smaller_limits(node, size):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        line = raw_dial(door.address, node)
        line.sendall(frames.PREFIX.pack(*size))
        assert is_closed(line)
        line.close()
        assert still_welcomes(door, accepted)


@both_doors
@pytest.mark.parametrize("sent", [0, 7], ids=["nothing", "half a prefix"])
def test_a_silent_dialler_holds_nobody_up_and_is_given_up(node, sent, monkeypatch, caplog):
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.5)
    with socket_folder() as folder, listening(folder) as (door, accepted):
        before = open_descriptors()
        silent = raw_dial(door.address, node)
        silent.sendall(bytes(sent))
        assert still_welcomes(door, accepted)
        assert "refused" not in caplog.text, "the honest one had to wait"
        assert is_closed(silent)
        silent.close()
        wait_until(lambda: open_descriptors() <= before)
    assert "refused a dialler: " in caplog.text


def test_a_dialler_that_drips_is_given_up(monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.3)
    with socket_folder() as folder, listening(folder) as (door, _):
        line = raw_dial(door.address, NEAR)
        read_frame(line)
        line.settimeout(0.1)
        line.send(frames.PREFIX.pack(1000, 0, 0))
        for _ in range(int(DEADLINE_S / 0.1)):  # less than the header's length
            try:
                line.send(b"\0")
                if line.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:  # closed while a byte was on its way to it
                break
        else:
            pytest.fail("it was heard out")
        line.close()


def test_a_crowd_of_silent_diallers_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr(listener, "MAX_HANDSHAKES", 3)
    with socket_folder() as folder, listening(folder) as (door, accepted):
        silent = [raw_dial(door.address, NEAR) for _ in range(3)]
        for line in silent:
            assert isinstance(read_frame(line), Challenge)
        late = raw_dial(door.address, NEAR)
        assert is_closed(late)
        late.close()
        for line in silent:
            line.close()
        wait_until(lambda: not door._strangers)
        assert still_welcomes(door, accepted)
    assert "3 others are in their handshake" in caplog.text


def test_a_handler_that_fails_stops_nobody(caplog):
    with socket_folder() as folder:
        door = Listener(node=NEAR, unix_path=folder / "d.sock", secret=b"", on_link=lambda link, hello: 1 / 0)
        for _ in range(2):
            with pytest.raises(LinkClosed):
                dial(door.address).receive()
        door.close()
    assert "ZeroDivisionError" in caplog.text


def test_closing_a_listener_drops_strangers_and_the_path(monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 3600.0)
    with socket_folder() as folder:
        with listening(folder) as (door, _):
            line = raw_dial(door.address, NEAR)
            read_frame(line)
        assert is_closed(line)
        line.close()
        assert not list(folder.iterdir())
        door.close()


def test_tcp_is_closed_unless_asked_for():
    with socket_folder() as folder:
        door = Listener(node=NEAR, unix_path=folder / "d.sock", secret=b"", on_link=lambda link, hello: None)
        assert (door.address.host, door.address.port) == ("", 0)
        door.close()


@pytest.mark.parametrize(
    ("host", "secret", "complaint"),
    [
        ("0.0.0.0", SECRET, "one interface"),
        ("::", SECRET, "one interface"),
        ("10.1.2.3", b"", "need the service's secret"),
        ("node-7.example", SECRET, "does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_tcp_listens_to_the_wide_only_on_one_interface_and_with_a_secret(host, secret, complaint):
    before = open_descriptors()
    with socket_folder() as folder:
        with pytest.raises(ValueError, match=complaint):
            Listener(node=NEAR, unix_path=folder / "d", secret=secret, on_link=lambda link, hello: None, host=host)
        assert not list(folder.iterdir())
    assert open_descriptors() <= before


def test_the_socket_lies_where_only_its_owner_enters():
    with socket_folder() as folder:
        with listening(folder / "new") as (door, accepted):
            assert (folder / "new").stat().st_mode & 0o777 == 0o700
            assert still_welcomes(door, accepted)
        for mode in (0o755, 0o770, 0o701):
            (folder / "new").chmod(mode)
            with pytest.raises(ValueError, match=f"has mode {mode:o} .* it must be 700"):
                doors.listen_unix(folder / "new" / "d.sock")


def test_a_path_too_long_is_refused_with_the_limit():
    with socket_folder() as folder:
        name = "d" * (doors.MAX_PATH_BYTES - len(os.fsencode(folder)) - 1)
        doors.listen_unix(folder / name).close()
        with pytest.raises(ValueError, match="has 108 bytes; the limit is 107"):
            doors.listen_unix(folder / f"{name}d")


def test_a_dead_listeners_path_is_taken_over_and_a_living_ones_is_not():
    with socket_folder() as folder:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(folder / "door.sock"))
        dead.close()
        with listening(folder) as (door, accepted):
            with pytest.raises(ValueError, match="somebody listens"):
                doors.listen_unix(folder / "door.sock")
            assert still_welcomes(door, accepted)
        (folder / "file").write_text("precious")
        with pytest.raises(OSError, match="in use"):
            doors.listen_unix(folder / "file")
        assert (folder / "file").read_text() == "precious"


def test_a_tcp_port_in_use_is_an_error():
    with socket_folder() as folder, listening(folder) as (door, _), pytest.raises(OSError, match="in use"):
        doors.listen_tcp("127.0.0.1", door.address.port, b"")
