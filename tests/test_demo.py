"""The table that ends `make demo`, from readings and counters that are made up."""

from __future__ import annotations

import pytest

from tramontane.client import RouterStats, StageStats, Stats
from tramontane.deploy.demo import LINE_WIDTH, Reading, show


def stats(*, microbatches: int, tokens: int, busy_ns: tuple[int, int]) -> Stats:
    router = RouterStats(
        name="0",
        microbatches=microbatches,
        tokens=tokens,
        prompt_tokens=0,
        completion_tokens=0,
        preemptions=0,
        waiting=0,
        running=0,
        in_flight_microbatches=0,
        kv_blocks_used=(0,),
        kv_blocks_total=(8,),
    )
    stages = tuple(StageStats(name=f"0.{index}", busy_ns=busy, steps=0, tokens=0) for index, busy in enumerate(busy_ns))
    return Stats(processes=(), stages=stages, routers=(router,))


def reading(user: int, first: float | None, last: float, prompt_tokens: int, tokens: int) -> Reading:
    return Reading(user, sent=10.0, first=first, last=last, prompt_tokens=prompt_tokens, tokens=tokens)


def test_the_tables_numbers(capsys):
    readings = [
        reading(1, first=10.25, last=12.25, prompt_tokens=20, tokens=41),
        reading(2, first=10.5, last=10.5, prompt_tokens=30, tokens=1),
        reading(3, first=11.0, last=13.0, prompt_tokens=102, tokens=6),
    ]
    before = stats(microbatches=10, tokens=1000, busy_ns=(10**9, 5 * 10**9))
    after = stats(microbatches=110, tokens=1250, busy_ns=(3 * 10**9, 6 * 10**9))
    show(readings, before, after, wall_s=4.0)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "user prompt tokens tokens TTFT ms tokens/s",
        "1 20 41 250 20.0",
        "2 30 1 500 nan",  # one token has no rate
        "3 102 6 1000 2.5",
        "TTFT median 500 ms, worst 1000 ms",
        "12 tokens/s generated, 50 with prompts",
        "100 microbatches of 2.5 tokens on average",
        "stage 0.0 busy 50% of 4.0 s",
        "stage 0.1 busy 25% of 4.0 s",
    ]


@pytest.mark.parametrize(("end", "printed"), [(False, []), (True, ["  user  7 | one / two"])])
def test_a_line_that_is_not_full_is_kept_back_until_the_end(capsys, end, printed):
    reading = Reading(7, sent=0.0)
    reading.take("one\n")
    reading.take("two", end=end)
    assert capsys.readouterr().out.splitlines() == printed


def test_a_line_is_printed_as_soon_as_it_is_full(capsys):
    reading = Reading(7, sent=0.0)
    reading.take("x" * (LINE_WIDTH + 5))
    assert capsys.readouterr().out == f"  user  7 | {'x' * LINE_WIDTH}\n"
    reading.take("", end=True)
    assert capsys.readouterr().out == "  user  7 | xxxxx\n"
