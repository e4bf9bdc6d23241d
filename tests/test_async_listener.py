"""The asyncio listener: who gets a link, how long strangers are heard, and what closing leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket

import numpy as np
import pytest
from async_wires import dial, listener_of
from strangers import STRANGER, hear, knock, listen_as_one_of_us, needs_root, stranger
from wires import (
    DEADLINE_S,
    FAR,
    NEAR,
    SECRET,
    both_doors,
    dialling_from,
    greet,
    is_closed,
    microbatch,
    open_descriptors,
    raw_dial,
    read_frame,
    socket_folder,
)

from tramontane.cluster import frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.async_link import AsyncLink
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import PROTOCOL, Cancel, Challenge, Hello, Role


@pytest.fixture
def folder():
    with socket_folder() as path:
        yield path


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@both_doors
@pytest.mark.parametrize("wrong", [b"a guess", SECRET + b"!"])
async def test_another_secret_is_refused_and_not_told(folder, node, wrong, caplog):
    async with listener_of(folder) as (listener, accepted):
        with pytest.raises(LinkClosed, match="closed by the other end"):
            await dial(listener.address, node=node, secret=wrong, name="mallory")
        assert accepted.empty()
        honest = await dial(listener.address, node=node)
        await accepted.get()
        honest.close()
    assert [record.getMessage() for record in caplog.records] == ["door refused a dialler: mallory has another secret"]


async def test_another_protocol_is_refused_on_both_sides(folder, caplog):
    async with listener_of(folder) as (listener, accepted):
        line = await asyncio.to_thread(lambda: greet(raw_dial(listener.address, NEAR), protocol=PROTOCOL + 1))
        assert await asyncio.to_thread(is_closed, line)
        line.close()
        assert f"door refused a dialler: it speaks protocol {PROTOCOL + 1}, here is {PROTOCOL}" in caplog.text
        assert accepted.empty()
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialling = asyncio.create_task(dial(Address(NEAR, "", *server.getsockname()), node=FAR))
        line, _ = await asyncio.to_thread(server.accept)
        line.sendall(b"".join(frames.encode(Challenge(protocol=PROTOCOL + 1, nonce=bytes(32)))))
        with pytest.raises(LinkClosed, match=f"it speaks protocol {PROTOCOL + 1}, here is {PROTOCOL}"):
            await dialling
        line.close()


@pytest.mark.parametrize("size", [(1 << 12, 0, 0), (8, 1 << 20, 0), (8, 0, 8)], ids=["header", "arrays", "rows"])
async def test_strangers_get_smaller_limits(folder, size):
    async with listener_of(folder) as (listener, accepted):
        line = await asyncio.to_thread(raw_dial, listener.address, NEAR)
        line.sendall(frames.PREFIX.pack(*size))
        assert await asyncio.to_thread(is_closed, line)
        line.close()
        assert accepted.empty()


async def test_what_follows_the_hello_at_once_is_not_measured_by_a_strangers_limits(folder):
    async with listener_of(folder) as (listener, accepted):
        line = await asyncio.to_thread(raw_dial, listener.address, NEAR)
        challenge = await asyncio.to_thread(read_frame, line)
        hello = handshake.Dialler(role=Role.ROUTER, name="r", epoch=1, secret=SECRET).answer(challenge)
        line.sendall(b"".join(frames.encode(hello)) + b"".join(frames.encode(microbatch(0, np.arange(5000)))))
        link, _ = await asyncio.wait_for(accepted.get(), DEADLINE_S)
        assert len((await link.receive()).tokens) == 5000
        line.close()


async def test_a_silent_dialler_holds_nobody_up_and_is_given_up(folder, monkeypatch, caplog):
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.5)
    async with listener_of(folder) as (listener, accepted):
        silent = await asyncio.to_thread(raw_dial, listener.address, NEAR)
        honest = await dial(listener.address)
        await accepted.get()
        assert "refused" not in caplog.text, "the honest one had to wait"
        honest.close()
        assert await asyncio.to_thread(is_closed, silent)
        silent.close()
    assert "refused a dialler: it says nothing" in caplog.text


async def test_a_crowd_that_comes_at_once_is_bounded(folder, monkeypatch):
    """All are accepted in one turn of the loop, before any handshake has begun."""
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    async with listener_of(folder) as (listener, _):
        crowd = [raw_dial(listener.address, NEAR) for _ in range(20)]  # the loop stands still meanwhile
        answers = await asyncio.gather(*(asyncio.to_thread(line.recv, 1000) for line in crowd))
        assert sum(bool(answer) for answer in answers) == 2
        for line in crowd:
            line.close()


@needs_root
async def test_strangers_hear_nothing_whether_they_dial_or_listen(folder, caplog):
    async with listener_of(folder) as (listener, _):
        path = listener.address.unix_path
        folder.chmod(0o777)
        os.chmod(path, 0o777)
        with stranger(lambda line: line.send(knock(path))) as line:
            assert await asyncio.to_thread(hear, line) == b""
        assert f"door refused a dialler: the other end is user {STRANGER}, this one 0" in caplog.text
        path = str(folder / "impostor.sock")
        with stranger(lambda line: listen_as_one_of_us(path, line)) as line:
            assert await asyncio.to_thread(hear, line) == "listening"
            with pytest.raises(LinkClosed, match=f"the other end is user {STRANGER}, this one 0"):
                await dial(Address(NEAR, path, "", 0))
            assert await asyncio.to_thread(hear, line) == b""


async def test_a_crowd_of_silent_diallers_is_bounded(folder, monkeypatch, caplog):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    async with listener_of(folder) as (listener, _):
        crowd = [await asyncio.to_thread(raw_dial, listener.address, NEAR) for _ in range(2)]
        for line in crowd:
            await asyncio.to_thread(read_frame, line)
        late = await asyncio.to_thread(raw_dial, listener.address, NEAR)
        assert await asyncio.to_thread(is_closed, late)
        for line in (*crowd, late):
            line.close()
    assert "2 others are in their handshake" in caplog.text


async def test_dialling_gives_up_on_nobody_and_on_a_listener_that_says_nothing(folder):
    with pytest.raises(LinkClosed, match="No such file"):
        await dial(Address(NEAR, str(folder / "nobody.sock"), "", 0))
    with pytest.raises(LinkClosed, match="node near has no TCP door for node far"):
        await dial(Address(NEAR, str(folder / "nobody.sock"), "", 0), node=FAR)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(NEAR, "", "127.0.0.1", server.getsockname()[1])
        with pytest.raises(LinkClosed, match="timed out"):
            await AsyncLink.dial(address, dialling_from(FAR), role=Role.STAGE, name="s", epoch=1, timeout_s=0.2)


async def test_a_handler_that_fails_or_returns_closes_its_link_only(folder, caplog):
    async def handle(link: AsyncLink, hello: Hello) -> None:
        assert hello.name != "bad", "of all names"
        await link.send(await link.receive())

    async with listener_of(folder, handle) as (listener, _):
        bad = await dial(listener.address, name="bad")
        with pytest.raises(LinkClosed):
            await bad.receive()
        good = await dial(listener.address, name="good")
        await good.send(Cancel(request=1))
        assert (await good.receive()).request == 1
        with pytest.raises(LinkClosed):
            await good.receive()
    assert "of all names" in caplog.text


@both_doors
async def test_closing_a_listener_ends_its_links_tasks_and_descriptors(folder, node):
    descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
    stuck = asyncio.Event()

    async def handle(link: AsyncLink, hello: Hello) -> None:
        await (stuck.wait() if hello.name == "stuck" else link.receive())

    async with listener_of(folder, handle) as (listener, _):
        links = [await dial(listener.address, node=node, name=name) for name in ("stuck", "reader")]
        stranger = await asyncio.to_thread(raw_dial, listener.address, node)
        await asyncio.to_thread(read_frame, stranger)
    assert not list(folder.iterdir())
    assert await asyncio.to_thread(is_closed, stranger)
    stranger.close()
    for link in links:
        with pytest.raises(LinkClosed):
            await link.receive()
        await link.wait_closed()
    # At most: what tests before this one have left may go meanwhile.
    await until(lambda: open_descriptors() <= descriptors and len(asyncio.all_tasks()) <= tasks)
