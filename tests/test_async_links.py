"""Links on asyncio: the same frames, many links on one loop, cancellation anywhere, bounded buffers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import numpy as np
import pytest
from async_wires import dial, linked, listener_of, raw_link
from wires import (
    DEADLINE_S,
    FAR,
    NEAR,
    both_doors,
    is_closed,
    listening,
    microbatch,
    socket_folder,
)
from wires import dial as dial_blocking

from tramontane.cluster import async_stream, doors, frames
from tramontane.cluster.async_link import AsyncLink
from tramontane.cluster.frames import FrameError
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Cancel, Hello


@pytest.fixture
def folder():
    with socket_folder() as path:
        yield path


@both_doors
async def test_messages_keep_their_order_in_both_directions(folder, node):
    async with linked(folder, node) as ends:
        for sender, receiver in (ends, ends[::-1]):
            for number in range(500):
                await sender.send(Cancel(request=number))
            assert [(await receiver.receive()).request for _ in range(500)] == list(range(500))


@both_doors
async def test_messages_of_many_tasks_in_one_turn_arrive_whole_and_in_order(folder, node):
    async with linked(folder, node) as (mine, theirs):
        await asyncio.gather(*(mine.send(Cancel(request=number)) for number in range(100)))
        assert [(await theirs.receive()).request for _ in range(100)] == list(range(100))


@both_doors
async def test_frames_larger_than_all_buffers_arrive(folder, node):
    async with linked(folder, node) as (mine, theirs):
        tokens = np.arange(2 << 20, dtype=np.int32)
        sender = asyncio.create_task(mine.send(microbatch(0, tokens)))
        message = await theirs.receive()
        await sender
        assert np.array_equal(message.tokens, tokens)
        assert message.tokens.flags.aligned


class Foreign:
    """A transport of another loop: uvloop's derive from nothing of asyncio's."""

    def __init__(self, transport):
        self._transport = transport

    def __getattr__(self, name):
        return getattr(self._transport, name)


@both_doors
async def test_transports_of_other_loops_will_do(folder, node, monkeypatch):
    made = async_stream.FrameStream.connection_made
    monkeypatch.setattr(async_stream.FrameStream, "connection_made", lambda self, line: made(self, Foreign(line)))
    async with linked(folder, node) as (mine, theirs):
        await mine.send(Cancel(request=1))
        assert (await theirs.receive()).request == 1


@both_doors
async def test_both_kinds_of_link_understand_each_other(folder, node):
    with listening(folder, name="blocking") as (listener, accepted):
        mine = await dial(listener.address, node=node)
        theirs, _ = await asyncio.to_thread(accepted.get, timeout=DEADLINE_S)
        await mine.send(microbatch(3, [1, 2]))
        assert (await asyncio.to_thread(theirs.receive)).tokens.tolist() == [1, 2]
        theirs.send(Cancel(request=4))
        assert (await mine.receive()).request == 4
        theirs.close()
        with pytest.raises(LinkClosed, match="closed by the other end"):
            await mine.receive()
    async with listener_of(folder) as (listener, accepted):
        mine = await asyncio.to_thread(lambda: dial_blocking(listener.address, node=node))
        theirs, _ = await accepted.get()
        await asyncio.to_thread(mine.send, Cancel(request=5))
        assert (await theirs.receive()).request == 5
        mine.close()


async def test_a_loop_holds_many_links(folder):
    async def echo(link: AsyncLink, hello: Hello) -> None:
        async for message in link.messages():
            await link.send(message)

    async with listener_of(folder, echo) as (listener, _):
        links = await asyncio.gather(*(dial(listener.address, node=(NEAR, FAR)[number % 2]) for number in range(20)))
        for number, link in enumerate(links):
            await link.send(Cancel(request=number))
        assert [(await link.receive()).request for link in links] == list(range(20))
        for link in links:
            link.close()


async def test_what_arrived_before_the_end_is_still_received(folder):
    async with linked(folder, NEAR) as (mine, theirs):
        for number in range(3):
            await mine.send(Cancel(request=number))
        mine.close()
        await theirs.wait_closed()
        assert [message.request async for message in theirs.messages()] == [0, 1, 2]
        with pytest.raises(LinkClosed, match="closed by the other end"):
            await theirs.send(Cancel(request=9))
        with pytest.raises(LinkClosed, match="closed by the other end"):
            theirs.post(Cancel(request=9))


async def test_close_wakes_receivers_and_senders_with_the_reason(folder):
    async with linked(folder, NEAR) as (mine, _):
        jobs = [asyncio.create_task(mine.receive())]
        jobs += [asyncio.create_task(mine.send(microbatch(0, np.zeros(1 << 20)))) for _ in range(3)]
        await asyncio.sleep(0)
        mine.close("time to go")
        mine.close("again")
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes if outcome is not None] == ["time to go"] * 3


@both_doors
async def test_a_sender_waits_for_an_other_end_that_does_not_read(folder, node):
    frame = len(b"".join(frames.encode(microbatch(0, np.zeros(10_000)))))
    async with linked(folder, node) as (mine, theirs):
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for step in range(2000):
                await mine.send(microbatch(step, np.zeros(10_000)))
                sent += 1

        job = asyncio.create_task(flood())
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        buffers = 16 << 20  # ours on both ends, and the kernel's, which grow
        assert 0 < sent * frame < buffers
        assert [(await theirs.receive()).step for _ in range(2000)] == list(range(2000))
        await job


async def test_a_cancelled_receive_loses_nothing(folder):
    async with linked(folder, NEAR) as (mine, theirs):
        frame = b"".join(frames.encode(Cancel(request=1)))
        for cut in (0, 1, frames.PREFIX.size, frames.PREFIX.size + 3, len(frame)):
            receiver = asyncio.create_task(theirs.receive())
            mine._stream.write(frame[:cut])
            await asyncio.sleep(0.01)
            receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert (await receiver).request == 1  # it was whole, and the task done
                continue
            mine._stream.write(frame[cut:])
            assert (await theirs.receive()).request == 1


async def test_a_cancelled_send_sends_all_or_nothing(folder):
    async with linked(folder, NEAR) as (mine, theirs):
        jobs = [asyncio.create_task(mine.send(microbatch(step, np.full(200_000, step)))) for step in range(12)]
        await asyncio.sleep(0.05)
        waiting = [step for step, job in enumerate(jobs) if not job.done()]
        assert waiting
        for step in waiting:
            jobs[step].cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        last = asyncio.create_task(mine.send(Cancel(request=7)))
        received = []
        while not isinstance(message := await theirs.receive(), Cancel):
            assert (message.tokens == message.step).all()
            received.append(message.step)
        await last
        assert received == [step for step in range(12) if step not in waiting]


async def test_a_message_that_does_not_fit_leaves_the_link_as_it_was(folder):
    async with linked(folder, NEAR) as (mine, theirs):
        with pytest.raises(FrameError):
            await mine.send(Cancel(request="seven"))
        await mine.send(Cancel(request=7))
        assert (await theirs.receive()).request == 7


@pytest.mark.parametrize(
    ("noise", "complaint"),
    [
        (frames.PREFIX.pack(1 << 17, 0, 0), "header: 131072 bytes, the limit is"),
        (frames.PREFIX.pack(8, 1 << 27, 0), "arrays: .* the limit is"),
        (frames.PREFIX.pack(8, 0, 1 << 31), "rows: .* the limit is"),
        (frames.PREFIX.pack(8, 0, 64), "rows: 64 bytes, none are expected"),
        (frames.PREFIX.pack(4, 0, 0) + b"\xff" * 4, "header: "),
    ],
)
async def test_noise_and_lengths_over_their_limits_end_the_link(folder, noise, complaint):
    async with listener_of(folder) as (listener, accepted):
        line, link = await raw_link(listener, accepted)
        line.sendall(noise)
        with pytest.raises(LinkClosed, match=f"not a frame: {complaint}"):
            await link.receive()
        assert await asyncio.to_thread(is_closed, line)
        line.close()


async def test_half_a_frame_and_the_end_is_the_end(folder):
    async with listener_of(folder) as (listener, accepted):
        line, link = await raw_link(listener, accepted)
        line.sendall(b"".join(frames.encode(Cancel(request=1)))[:-1])
        line.close()
        with pytest.raises(LinkClosed, match="closed by the other end"):
            await link.receive()


SILENCE_S = 0.25


@pytest.fixture
def brisk(monkeypatch):
    """Heartbeats that are twenty times as fast."""
    monkeypatch.setattr(doors, "HEARTBEAT_PERIOD_S", 0.025)


@both_doors
@pytest.mark.usefixtures("brisk")
async def test_an_idle_link_stays_open_though_nobody_receives(folder, node):
    async with linked(folder, node, silence_s=SILENCE_S) as (mine, theirs):
        await asyncio.sleep(1.0)  # four times the silence that ends a link
        assert len(theirs._stream._received) <= len(frames.HEARTBEAT), "heartbeats pile up"
        await mine.send(Cancel(request=3))
        assert (await theirs.receive()).request == 3


@both_doors
@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("sent", [0, 5, 20], ids=["nothing", "half a prefix", "half a header"])
async def test_a_peer_that_falls_silent_is_given_up(folder, node, sent):
    async with listener_of(folder, silence_s=SILENCE_S) as (listener, accepted):
        line, link = await raw_link(listener, accepted, node)
        line.sendall(b"".join(frames.encode(Cancel(request=1)))[:sent])
        with pytest.raises(LinkClosed, match=r"silent for 0\.25 s"):
            await asyncio.wait_for(link.receive(), DEADLINE_S)
        line.close()


async def test_tcps_own_limit_follows_the_silence(folder):
    async with linked(folder, FAR, silence_s=7.0) as ends:
        for link in ends:
            assert link._stream.line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


@pytest.mark.usefixtures("brisk")
async def test_a_loop_that_was_busy_does_not_take_that_for_silence(folder, monkeypatch):
    monkeypatch.setattr(async_stream, "STALL_S", 0.1)
    with listening(folder, name="blocking") as (listener, accepted):
        mine = await dial(listener.address, node=FAR, silence_s=SILENCE_S)
        theirs, _ = await asyncio.to_thread(accepted.get, timeout=DEADLINE_S)
        time.sleep(0.6)  # noqa: ASYNC251  (the loop is held up on purpose; the other end beats in a thread)
        await asyncio.sleep(0.1)
        await mine.send(Cancel(request=1))
        assert (await asyncio.to_thread(theirs.receive)).request == 1
        mine.close()


async def test_closing_a_link_whose_other_end_does_not_read_frees_it_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(async_stream, "CLOSE_GRACE_S", 0.1)
    async with listener_of(folder) as (listener, accepted):
        line, link = await raw_link(listener, accepted)
        await link.send(microbatch(0, np.zeros(4 << 20)))
        link.close()
        await asyncio.wait_for(link.wait_closed(), DEADLINE_S)
        line.close()
