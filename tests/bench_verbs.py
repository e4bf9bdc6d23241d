"""`tramontane bench` as a user runs it, against a fake server, for tests of its verbs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from fake_server import FakeServer, count_up

TRAMONTANE = Path(sys.executable).with_name("tramontane")
FAST = ["--words", "--output-tokens", "8", "--warmup", "0s", "--no-ceiling", "--quiet", "--alone", "4"]

SPOILED = 4


def start(*arguments: object) -> subprocess.Popen[str]:
    words = [str(argument) for argument in (TRAMONTANE, "bench", *arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """What it said. A run that is fine but for a busy machine, which spoils its figures, is as good as one with 0."""
    out, err = process.communicate(timeout=120)
    spoiled = (process.returncode, status) == (SPOILED, 0) and "the generator's own lag" in out
    assert process.returncode == status or spoiled, out + err
    assert "Traceback" not in err
    return out, err


def bench_ends(status: int, *arguments: object) -> tuple[str, str]:
    return ended(start(*arguments), status)


def to(server: FakeServer) -> list[str]:
    return ["--target", server.target, "--model", "counting"]


def steady(request, context):
    """The honest answer, 100 ms to its first token and 10 ms to each other."""
    for place, event in enumerate(count_up(request, context)):
        time.sleep(0.01 if place else 0.1)
        yield event
