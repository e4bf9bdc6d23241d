"""`make demo`: start the service on this machine, let a dozen users talk to it at once, show how it went, end it.

The server is the `tramontane serve` that anyone would type, in a process of its own; the users are coroutines with one
gRPC client.
"""

from __future__ import annotations

import asyncio
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from tramontane.client import AsyncClient, Stats

STAGES = 2
MAX_TOKENS = 96
LINE_WIDTH = 88

VERSE = """The wind that from the northern mountain falls
Hath swept the harbour clean of idle sail,
And every lantern on the old sea walls
Leans with its little fire before the gale.
Who rides tonight rides hard, and rides alone;
The road is long, the moon a broken shield,
And he that sits unchallenged on the throne
Hath never slept one winter in the field.
"""

OPENINGS = [
    "KING:\nWhat news",
    "FIRST LORD:\nMy gracious liege, ",
    "ROMEO:\n",
    "The queen is",
    "DUKE:\nBring forth the prisoner, and let him speak.\n\nPRISONER:\n",
    "NURSE:\nO, my young lady, ",
    "SECOND MURDERER:\nI like not this,",
    "CAPTAIN:\n" + VERSE + "\nSAILOR:\n",
    "CHORUS:\n" + VERSE * 2 + "\nA VOICE:\n",
    "GHOST:\n" + VERSE * 4 + "\nPRINCE:\n",
    "PRINCE:\n" + VERSE * 8 + "\nHERALD:\n",
    "MESSENGER:\n" + VERSE * 12 + "\nKING:\n",
]


@dataclass
class Reading:
    """One user's completion as it comes."""

    user: int
    sent: float
    first: float | None = None
    last: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    pending: str = field(default="", repr=False)

    def take(self, text: str, *, end: bool = False) -> None:
        """Print whole lines as they fill, so that the streams can be seen to run side by side."""
        self.pending += text.replace("\n", " / ")
        while len(self.pending) >= LINE_WIDTH or (end and self.pending):
            click.echo(f"  user {self.user:2d} | {self.pending[:LINE_WIDTH]}")
            self.pending = self.pending[LINE_WIDTH:]


async def read(client: AsyncClient, user: int, prompt: str) -> Reading:
    """Send one prompt and show its completion as it streams."""
    reading = Reading(user, sent=time.perf_counter())
    async with client.stream(prompt, max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.95, seed=user) as stream:
        async for delta in stream:
            reading.last = time.perf_counter()
            reading.first = reading.first or reading.last
            reading.tokens += len(delta.token_ids)
            reading.take(delta.text)
        reading.take("", end=True)
        reading.prompt_tokens = stream.usage.prompt_tokens
    return reading


async def run(target: str) -> None:
    """All users at once, then the table."""
    async with AsyncClient(target) as client:
        (model,) = await client.models()
        click.echo(f"\n{len(OPENINGS)} users at once, {MAX_TOKENS} tokens each, window {model.window_tokens} tokens\n")
        before, started = await client.stats(), time.perf_counter()
        readings = await asyncio.gather(*(read(client, user, text) for user, text in enumerate(OPENINGS, start=1)))
        wall_s, after = time.perf_counter() - started, await client.stats()
    show(readings, before, after, wall_s)


def show(readings: list[Reading], before: Stats, after: Stats, wall_s: float) -> None:
    """The small table: what the users saw, and how busy the pipeline was meanwhile."""
    click.echo("\n  user   prompt tokens   tokens   TTFT ms   tokens/s")
    ttfts_ms = []
    for reading in readings:
        first = reading.first or reading.last
        ttfts_ms.append((first - reading.sent) * 1e3)
        rate = (reading.tokens - 1) / (reading.last - first) if reading.last > first else float("nan")
        click.echo(
            f"  {reading.user:4d} {reading.prompt_tokens:15d} {reading.tokens:8d} {ttfts_ms[-1]:9.0f} {rate:10.1f}"
        )
    router, router_before = after.routers[0], before.routers[0]
    microbatches = router.microbatches - router_before.microbatches
    rows = router.tokens - router_before.tokens
    generated = sum(reading.tokens for reading in readings)
    prompts = sum(reading.prompt_tokens for reading in readings)
    click.echo(f"\n  TTFT median {statistics.median(ttfts_ms):.0f} ms, worst {max(ttfts_ms):.0f} ms")
    click.echo(f"  {generated / wall_s:.0f} tokens/s generated, {(generated + prompts) / wall_s:.0f} with prompts")
    click.echo(f"  {microbatches} microbatches of {rows / microbatches:.1f} tokens on average")
    for stage, stage_before in zip(after.stages, before.stages, strict=True):
        busy = (stage.busy_ns - stage_before.busy_ns) / 1e9 / wall_s
        click.echo(f"  stage {stage.name} busy {busy:.0%} of {wall_s:.1f} s")


def main() -> int:
    """Start the server, run the users, end the server. The exit status is the server's."""
    command = [str(Path(sys.executable).with_name("tramontane")), "serve", "--stages", str(STAGES), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  (our own command)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            click.echo(f"  server | {line}", nl=False)
            if ready := re.match(r"ready: .* on (\S+)", line):
                asyncio.run(run(ready[1]))
                break
    finally:
        server.send_signal(signal.SIGINT)
        for line in server.stdout:
            click.echo(f"  server | {line}", nl=False)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
