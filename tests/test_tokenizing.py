"""Work of many users on few threads: whose step is next, what is held, and what becomes of work that nobody waits for.

The steps here wait for the test, so that it sees each of them under way.
"""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from calls import Code, eventually

from tramontane.cluster.errors import CallError
from tramontane.cluster.tokenizing import INLINE_BYTES, Tokenizing

LARGE = INLINE_BYTES + 1


class Bench:
    """Where steps are done: each waits until the test lets so many more go on."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.begun = 0
        self.threads: set[str] = set()
        self._allowed = threading.Semaphore(0)

    def steps(self, name: str, count: int = 1):
        """The first step is a glance; it waits for nothing."""
        self.threads.add(threading.current_thread().name)
        yield
        for _ in range(count):
            self.begun += 1
            assert self._allowed.acquire(timeout=30)
            self.done.append(name)
            yield
        return name

    def allow(self, count: int) -> None:
        self._allowed.release(count)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.allow(1000)


@pytest.fixture
async def one_thread():
    tokenizing = Tokenizing(threads=1, limit_bytes=100 * LARGE)
    yield tokenizing
    tokenizing.close()


def run(tokenizing: Tokenizing, user: str, steps, size: int = LARGE) -> asyncio.Task:
    return asyncio.create_task(tokenizing.run(user, size, steps))


async def test_users_take_turns_by_the_step_however_much_one_of_them_sends(one_thread, bench):
    flood = [run(one_thread, "ann", bench.steps("a", 3)) for _ in range(20)]
    await eventually(lambda: bench.begun == 1)
    bystander = run(one_thread, "bob", bench.steps("b", 2))
    await asyncio.sleep(0)
    bench.allow(1000)
    assert await bystander == "b"
    assert "".join(bench.done).index("b") <= 1, "who waits must be next after the step under way"
    assert "".join(bench.done[:8]).count("a") <= 6
    assert await asyncio.gather(*flood) == ["a"] * 20
    assert one_thread.held_bytes == 0


async def test_small_work_is_done_here_and_now(one_thread, bench):
    bench.allow(1)
    assert await one_thread.run("ann", INLINE_BYTES, bench.steps("a")) == "a"
    assert bench.threads == {threading.current_thread().name}


async def test_what_the_first_step_refuses_waits_for_nobody(one_thread, bench):
    def refuse():
        raise ValueError("no")
        yield

    waiting = run(one_thread, "ann", bench.steps("a"))
    await eventually(lambda: bench.begun == 1)
    with pytest.raises(ValueError, match="no"):
        await one_thread.run("bob", LARGE, refuse())
    bench.allow(1)
    await waiting


async def test_a_share_comes_back_only_when_the_work_is_gone(one_thread, bench):
    under_way, waiting = run(one_thread, "ann", bench.steps("a", 2)), run(one_thread, "ann", bench.steps("b"))
    await eventually(lambda: bench.begun == 1)
    assert one_thread.held_bytes == 2 * LARGE
    waiting.cancel()
    await asyncio.wait([waiting])
    assert one_thread.held_bytes == LARGE, "nobody had begun with what was cancelled"
    under_way.cancel()
    await asyncio.wait([under_way])
    assert one_thread.held_bytes == LARGE, "the thread still holds the text"
    bench.allow(1)
    await eventually(lambda: one_thread.held_bytes == 0)
    assert bench.begun == 1, "steps were done for nobody"
    bench.allow(1)
    assert await one_thread.run("bob", LARGE, bench.steps("c")) == "c"


async def test_too_much_waiting_work_is_refused_by_user_with_a_hint(bench):
    tokenizing = Tokenizing(threads=1, limit_bytes=9 * LARGE)
    try:
        waiting = [run(tokenizing, "ann", bench.steps("a")) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(CallError) as refused:
            await tokenizing.run("ann", LARGE, bench.steps("a"))
        assert refused.value.code == Code.RESOURCE_EXHAUSTED
        assert refused.value.retry_after_s == 1.0
        assert f"this request has {LARGE}" in refused.value.message
        waiting.append(run(tokenizing, "bob", bench.steps("b")))
        bench.allow(1000)
        assert await asyncio.gather(*waiting) == ["a", "a", "a", "a", "b"]
        assert await tokenizing.run("ann", LARGE, bench.steps("a")) == "a"
    finally:
        tokenizing.close()


@pytest.mark.parametrize("error", [ValueError("the user's"), KeyError("ours")])
async def test_what_a_step_raises_reaches_who_waits_and_frees_the_thread(one_thread, bench, error):
    def fail():
        yield
        raise error

    with pytest.raises(type(error)):
        await one_thread.run("ann", LARGE, fail())
    assert one_thread.held_bytes == 0
    bench.allow(1)
    assert await one_thread.run("ann", LARGE, bench.steps("a")) == "a"


async def test_a_user_s_mistake_keeps_nothing_in_memory(one_thread):
    class Text:
        """Counts those that live."""

        alive = 0

        def __init__(self) -> None:
            Text.alive += 1

        def __del__(self) -> None:
            Text.alive -= 1

    def refuse():
        text = Text()
        yield
        raise ValueError(f"{type(text).__name__} is too long")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="too long"):
            await one_thread.run("ann", LARGE, refuse())
        assert Text.alive == 0
    finally:
        gc.enable()


async def test_all_threads_work(bench):
    tokenizing = Tokenizing(threads=3)
    try:
        tasks = [run(tokenizing, "ann", bench.steps("a")) for _ in range(5)]
        await eventually(lambda: bench.begun == 3)
        bench.allow(5)
        assert await asyncio.gather(*tasks) == ["a"] * 5
    finally:
        tokenizing.close()


async def test_closing_with_work_under_way_is_quiet(bench, caplog):
    tokenizing = Tokenizing(threads=1)
    tasks = [run(tokenizing, "ann", bench.steps("a")) for _ in range(3)]
    await eventually(lambda: bench.begun == 1)
    tokenizing.close()
    bench.allow(1)
    await eventually(lambda: bench.done == ["a"])
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert tokenizing.held_bytes == 0
    assert not caplog.records
