"""A part that does not answer is noticed, one that is slow is not blamed, nor is any when the watcher slept."""

from __future__ import annotations

import asyncio

from virtual_time import run

from tramontane.cluster.answer_watch import watch_answers


class Part:
    """Answers at once, unless it is stopped."""

    def __init__(self) -> None:
        self.stopped = False
        self.fails = False
        self.heard: list[float] = []

    async def ask(self) -> None:
        if self.fails:
            raise ConnectionError("Ray is busy")
        if self.stopped:
            await asyncio.sleep(1e9)

    async def on_silence(self, silent_s: float) -> bool:
        self.heard.append(silent_s)
        return silent_s < 30


async def watched(part: Part, seconds: float) -> asyncio.Task:
    task = asyncio.create_task(watch_answers(part.ask, part.on_silence))
    await asyncio.sleep(seconds)
    return task


def test_a_part_that_answers_is_silent_for_no_time():
    async def scene():
        part = Part()
        (await watched(part, 60)).cancel()
        assert set(part.heard) == {0.0}

    run(scene())


def test_a_stopped_part_is_told_within_seven_seconds_and_again_until_it_goes_on():
    async def scene():
        part = Part()
        task = await watched(part, 10)
        part.stopped, begin, part.heard = True, asyncio.get_running_loop().time(), []
        while not any(part.heard):
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() - begin <= 9.0
        await asyncio.sleep(10)
        part.stopped = False
        await asyncio.sleep(4)
        assert part.heard[-1] == 0.0
        task.cancel()

    run(scene())


def test_beyond_the_limit_it_ends():
    async def scene():
        part = Part()
        part.stopped = True
        task = await watched(part, 60)
        assert task.done()
        assert max(part.heard) >= 30

    run(scene())


def test_a_question_that_fails_ends_no_watch_and_for_long_is_silence():
    async def scene():
        part = Part()
        part.fails = True
        task = await watched(part, 4)
        part.fails = False
        await asyncio.sleep(4)
        assert set(part.heard) == {0.0}
        part.stopped = True
        await asyncio.sleep(10)
        assert part.heard[-1] > 0.0
        part.stopped, part.fails = False, True
        await asyncio.sleep(60)
        assert task.done()
        assert max(part.heard) >= 30

    run(scene())


def test_a_watcher_that_was_stopped_itself_blames_nobody():
    async def scene():
        part = Part()
        task = await watched(part, 10)
        asyncio.get_running_loop().at_s += 60.0  # nothing ran meanwhile
        part.stopped = True
        await asyncio.sleep(1)
        part.stopped = False
        await asyncio.sleep(10)
        assert set(part.heard) == {0.0}
        task.cancel()

    run(scene())
