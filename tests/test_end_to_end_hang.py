"""A stage and a router that are stopped for good: named in time, requests end typed, and `serve` ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
from service import Service, eventually

from tramontane.client import Client, ClientOptions, TramontaneError, Unavailable

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("role", "name", "says"), [("stage", "0.1", "stage 1"), ("router", "0", "router-0")])
def test_a_part_that_is_stopped_for_good_is_late_and_then_hangs(role: str, name: str, says: str) -> None:
    service = Service("--stages", "2", "--hang-limit", "15", "--link-silence", "30")
    pid, ended = 0, []
    try:
        with Client(service.target, ClientOptions(wait=False)) as client:
            pid = next(p.pid for p in client.stats().processes if (p.role, p.name) == (role, name))

            def read() -> None:
                try:
                    with client.stream("To be", max_tokens=4000, ignore_eos=True) as stream:
                        for number, _ in enumerate(stream):
                            if number == 200:
                                begun.set()
                except TramontaneError as error:
                    ended.append(error)

            begun = threading.Event()
            reader = threading.Thread(target=read)
            reader.start()
            assert begun.wait(60)
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: any(says in line for line in client.stats().late))
            assert not ended, "late ends nothing"
            reader.join(60)
            assert [type(error) for error in ended] == [Unavailable]
        assert says in service.wait_for("^not serving: .*").group()
        assert service.process.wait(60) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        service.end()
