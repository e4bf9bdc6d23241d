"""Tokenizing beside the event loop: threads that all users share, a step at a time.

What is decided stands in `fairness.py`; the event loop decides, the threads only work.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import grpc

from tramontane.cluster.errors import RETRY_AFTER_S, CallError, without_frames
from tramontane.cluster.fairness import FairQueue, Shares
from tramontane.cluster.steps import Steps, finish

T = TypeVar("T")

INLINE_BYTES = 4096
"""Requests up to this size are worked on at once, on the event loop: it takes less than a millisecond."""
THREADS = 2
LIMIT_BYTES = 256 << 20
"""Larger requests of all users, those that wait and those that are worked on, may have so much together."""


@dataclass(eq=False)
class Job(Generic[T]):
    """One user's work on the threads."""

    user: str
    size: int
    steps: Steps[T]
    answer: asyncio.Future[T]
    """Cancelled where nobody waits for it any more."""

    def step(self) -> Step[T]:
        """Do one step."""
        began = time.thread_time()
        last, result, error = True, None, None
        try:
            next(self.steps)
            last = False
        except StopIteration as end:
            result = end.value
        except Exception as raised:
            error = without_frames(raised) if isinstance(raised, ValueError) else raised  # the user's mistake, or ours
        return Step(cpu_s=time.thread_time() - began, last=last, result=result, error=error)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[T]):
    """What a step has come to; the last has a result or an error."""

    cpu_s: float
    last: bool
    result: T | None
    error: Exception | None


class Tokenizing:
    """Does work of all users on a few threads. Next is a step of who has had the least of the threads' time."""

    def __init__(self, threads: int = THREADS, limit_bytes: int = LIMIT_BYTES) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._free = threads
        self._bytes = Shares(limit_bytes)
        self._queue: FairQueue[Job[Any]] = FairQueue()
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """The size of all work that waits or is under way. Cancelled work counts until its thread has left it."""
        return self._bytes.total - self._bytes.left

    async def run(self, user: str, size: int, steps: Steps[T]) -> T:
        """Do all steps: of small work here and now, of other work the first one, and the rest on threads.

        `size` is in bytes, of the request.

        Raises:
            CallError: RESOURCE_EXHAUSTED, where too much waits.
            Exception: what the steps raise.
        """
        if size <= INLINE_BYTES:
            return finish(steps)
        try:
            next(steps)
        except StopIteration as end:
            return cast(T, end.value)
        if not self._bytes.take(user, size):
            raise CallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._bytes.held_by(user)} bytes of yours wait to be tokenized and room is left for "
                f"{self._bytes.left}, half of which you may take; this request has {size}",
                retry_after_s=RETRY_AFTER_S,
            )
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        job = Job(user, size, steps, answer)
        self._queue.put(user, job)
        self._begin()
        try:
            return await answer
        except asyncio.CancelledError:
            if self._queue.discard(user, job):
                self._let_go(job)
            raise

    def close(self) -> None:
        """Let the threads go."""
        self._closed = True
        self._threads.shutdown(wait=False)

    def _begin(self) -> None:
        """Give free threads their next steps."""
        while self._free and not self._closed and (taken := self._queue.take()) is not None:
            _, job = taken
            self._free -= 1
            step = asyncio.get_running_loop().run_in_executor(self._threads, job.step)
            step.add_done_callback(partial(self._stepped, job))

    def _stepped(self, job: Job[T], done: asyncio.Future[Step[T]]) -> None:
        step = done.result()
        self._free += 1
        self._queue.charge(job.user, step.cpu_s)
        if job.answer.cancelled():
            self._let_go(job)
        elif not step.last:
            self._queue.put_back(job.user, job)
        else:
            self._let_go(job)
            if step.error is not None:
                job.answer.set_exception(step.error)
            else:
                job.answer.set_result(cast(T, step.result))
        self._begin()

    def _let_go(self, job: Job[Any]) -> None:
        """No thread works on it any more: what it held is free."""
        job.steps.close()
        self._bytes.give_back(job.user, job.size)
