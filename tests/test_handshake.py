"""Who gets a link: doors that strangers cannot enter, and a handshake that they do not pass."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from strangers import STRANGER, hear, knock, listen_as_one_of_us, needs_root, stranger
from wires import (
    DEADLINE_S,
    NEAR,
    SECRET,
    both_doors,
    dial,
    greet,
    in_thread,
    is_closed,
    listening,
    open_descriptors,
    raw_dial,
    read_frame,
    site_at,
    socket_folder,
    wait_until,
)

from tramontane.cluster import doors, frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.listener import Listener
from tramontane.cluster.messages import PROTOCOL, Cancel, Challenge, Hello, Role, Welcome


def hello(**changes):
    values = {"protocol": PROTOCOL, "role": Role.STAGE, "name": "s", "epoch": 1, "nonce": bytes(32), "proof": b""}
    return Hello(**{**values, **changes})


def still_welcomes(door, accepted):
    """The next dialler gets in."""
    dial(door.address, name="honest").close()
    link, greeting = accepted.get(timeout=DEADLINE_S)
    link.close()
    return greeting.name == "honest"


@both_doors
def test_the_secret_opens_the_door(node):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        with_secret = dial(door.address, node=node)
        link, _ = accepted.get(timeout=DEADLINE_S)
        with_secret.send(Cancel(request=1))
        assert link.receive().request == 1
        with_secret.close()
        link.close()


@both_doors
@pytest.mark.parametrize("wrong", [b"a guess", SECRET + b"!"])
def test_another_secret_is_refused_and_not_told(node, wrong, caplog):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        with pytest.raises(LinkClosed, match=r"no handshake with .*: closed by the other end"):
            dial(door.address, node=node, secret=wrong, name="mallory\n")
        assert accepted.empty()
        assert still_welcomes(door, accepted)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [r"door refused a dialler: 'mallory\n' has another secret"]


def test_a_proof_seen_before_is_worth_nothing():
    with socket_folder() as folder, listening(folder) as (door, accepted):
        line = raw_dial(door.address, NEAR)
        old = dialler().answer(read_frame(line))
        line.close()
        line = raw_dial(door.address, NEAR)
        greet(line, nonce=old.nonce, proof=old.proof)
        assert is_closed(line)
        line.close()
        assert still_welcomes(door, accepted)


@pytest.mark.parametrize(
    "change",
    [{"role": Role.GATEWAY}, {"name": "t"}, {"epoch": 2}, {"nonce": bytes(32)}, {"nonce": b""}],
    ids=["role", "name", "epoch", "nonce", "none"],
)
def test_the_proof_covers_all_that_a_dialler_says(change):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        line = raw_dial(door.address, NEAR)
        greet(line, **change)
        assert is_closed(line)
        line.close()
        assert still_welcomes(door, accepted)


def dialler(**changes):
    return handshake.Dialler(**{"role": Role.STAGE, "name": "s", "epoch": 1, "secret": SECRET, **changes})


def test_both_ends_prove_the_secret_and_neither_with_the_others_proof():
    greeter, one = handshake.Greeter(SECRET), dialler()
    told = one.answer(greeter.challenge)
    one.check(greeter.welcome(greeter.check(told)))
    other = dialler()
    for says in (
        Welcome(proof=told.proof),  # what the dialler itself has said
        Welcome(proof=greeter.welcome(other.answer(greeter.challenge)).proof),  # to another dialler
        Welcome(proof=handshake.Greeter(SECRET).welcome(told).proof),  # of another link
        handshake.Greeter(b"a guess").welcome(told),
        Welcome(proof=b""),
        greeter.challenge,
    ):
        with pytest.raises(handshake.HandshakeError):
            one.check(says)


@both_doors
def test_a_listener_without_the_secret_gets_no_link(node):
    """It repeats the dialler's own proof: all that it knows."""
    with (
        socket_folder() as folder,
        socket.socket(socket.AF_UNIX) as near,
        socket.create_server(("127.0.0.1", 0)) as far,
    ):
        near.bind(str(folder / "impostor.sock"))
        near.listen()
        address = Address(NEAR, str(folder / "impostor.sock"), *far.getsockname())
        outcome = in_thread(lambda: dial(address, node=node))
        line, _ = (near if node == NEAR else far).accept()
        line.sendall(b"".join(frames.encode(handshake.Greeter(b"a guess").challenge)))
        told = read_frame(line)
        line.sendall(b"".join(frames.encode(Welcome(proof=told.proof))))
        error = outcome.get(timeout=DEADLINE_S)
        line.close()
    assert isinstance(error, LinkClosed)
    assert "the listener has another secret" in str(error)


@both_doors
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (hello(protocol=PROTOCOL + 1), f"it speaks protocol {PROTOCOL + 1}, here is {PROTOCOL}"),
        (Cancel(request=1), "its first message is no hello"),
        (Challenge(protocol=PROTOCOL, nonce=bytes(32)), "its first message is no hello"),
        (hello(name="s" * 2000), "header: .* the limit is 1024"),
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
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 3)
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
        door = Listener("door", site_at(folder), lambda link, hello: 1 / 0)
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
        door = Listener("door", site_at(folder, host=None), lambda link, hello: None)
        assert (door.address.host, door.address.port) == ("", 0)
        door.close()


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("0.0.0.0", "one interface"),
        ("::", "one interface"),
        ("node-7.example", "does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_tcp_listens_on_one_interface_only(host, complaint):
    before = open_descriptors()
    with socket_folder() as folder:
        with pytest.raises(ValueError, match=complaint):
            Listener("door", site_at(folder, host=host), lambda link, hello: None)
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


@needs_root
def test_a_stranger_who_dials_hears_nothing(caplog):
    with socket_folder() as folder, listening(folder) as (door, accepted):
        path = Path(door.address.unix_path)
        folder.chmod(0o755)
        path.chmod(0o777)
        with stranger(lambda line: line.send(knock(str(path)))) as line:
            assert hear(line) == b""
        folder.chmod(0o700)
        assert still_welcomes(door, accepted)
    assert f"door refused a dialler: the other end is user {STRANGER}, this one 0" in caplog.text


@needs_root
def test_a_stranger_who_listens_hears_nothing():
    with socket_folder() as folder:
        path = folder / "impostor.sock"
        folder.chmod(0o777)
        with stranger(lambda line: listen_as_one_of_us(str(path), line)) as line:
            assert hear(line) == "listening"
            with pytest.raises(LinkClosed, match=f"the other end is user {STRANGER}, this one 0"):
                dial(Address(NEAR, str(path), "", 0))
            assert hear(line) == b""


def test_a_path_too_long_is_refused_with_the_limit():
    with socket_folder() as folder:
        name = "d" * (doors.MAX_PATH_BYTES - len(os.fsencode(folder)) - 1)
        doors.listen_unix(folder / name).close()
        with pytest.raises(ValueError, match="has 108 bytes; the limit is 107"):
            doors.listen_unix(folder / f"{name}d")


def test_a_dead_listeners_path_is_taken_over_and_a_living_ones_is_not():
    with socket_folder() as folder:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(site_at(folder).socket_path("door")))
        dead.close()
        with listening(folder) as (door, accepted):
            with pytest.raises(ValueError, match="somebody listens"):
                doors.listen_unix(Path(door.address.unix_path))
            assert still_welcomes(door, accepted)
        (folder / "file").write_text("precious")
        with pytest.raises(OSError, match="in use"):
            doors.listen_unix(folder / "file")
        assert (folder / "file").read_text() == "precious"


def test_a_tcp_port_in_use_is_an_error():
    with socket_folder() as folder, listening(folder) as (door, _), pytest.raises(OSError, match="in use"):
        doors.listen_tcp("127.0.0.1", door.address.port)
