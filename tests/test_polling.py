"""Polls: what they say last, since when they have been silent, and that one which hangs holds up nobody."""

from __future__ import annotations

import queue
import threading

import pytest
from service import eventually

from tramontane.cluster.polling import Poll, in_time

HANG_S = 300.0


class Asked:
    """Answers what the test puts in, and hangs until then."""

    def __init__(self) -> None:
        self.answers: queue.Queue[object] = queue.Queue()
        self.times = 0

    def __call__(self):
        answer = self.answers.get(timeout=HANG_S)
        self.times += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_last_answer_stands_and_silence_counts_from_it():
    asked, clock = Asked(), [100.0]
    with Poll(asked, 0.0, lambda: clock[0]) as poll:
        assert (poll.latest(), poll.silent_s()) == (None, 0.0)
        clock[0] = 107.0
        assert poll.silent_s() == 7.0
        asked.answers.put("here")
        eventually(lambda: poll.latest() == "here")
        assert poll.silent_s() == 0.0
        clock[0] = 110.0
        asked.answers.put(None)  # asked, and not answered
        eventually(lambda: asked.times == 2)
        assert (poll.latest(), poll.silent_s()) == ("here", 3.0)


def test_what_asking_raises_ends_the_poll_and_is_raised():
    asked = Asked()
    with Poll(asked, 0.0) as poll:
        asked.answers.put("here")
        asked.answers.put(ConnectionError("gone"))
        asked.answers.put("here again")

        def failed() -> bool:
            try:
                poll.latest()
            except ConnectionError as error:
                return str(error) == "gone"
            return False

        eventually(failed)
        assert failed()
    assert asked.times == 2


def test_nothing_is_asked_after_the_end():
    """A question to a Ray that was shut down would start another one."""
    asked = Asked()
    asked.answers.put("here")
    with Poll(asked, HANG_S) as poll:
        eventually(lambda: poll.latest() == "here")
    assert not poll._thread.is_alive()
    assert asked.times == 1


def test_a_job_in_time_a_job_that_fails_and_one_that_hangs():
    assert in_time(lambda: None, HANG_S)
    with pytest.raises(ValueError, match="no"):
        in_time(lambda: int("no"), HANG_S)
    go_on = threading.Event()
    assert not in_time(lambda: go_on.wait(HANG_S), 0.01)
    go_on.set()
