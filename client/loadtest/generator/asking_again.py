"""After a run its server, idle again, is asked some things once more: `judging/checks.py` holds the answers against it.

A server that gives no answer is not asked on, so that checking a dead one takes a deadline or two, not hundreds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from tramontane.client.loadtest.generator.target import Answer, OnTokens
from tramontane.client.loadtest.judging.agreement import Asked, identity, told
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import OK, PROTOCOL, Record
from tramontane.client.types import FinishReason

T = TypeVar("T")


class Server(Protocol):
    """What asking again needs of a `Target`."""

    async def send(self, ask: Ask, on_tokens: OnTokens) -> Answer:
        """See `Target`."""

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | None:
        """See `Target`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """What the server said after the run."""

    printed: tuple[tuple[Ask, Record, str], ...] = ()
    """Completions with what their ids print."""
    alone: tuple[tuple[Ask, Record, Answer], ...] = ()
    """Requests with the answer that each got with nobody beside it. The last one may be unanswered."""


async def ask_again(
    asked: Sequence[Asked], server: Server, *, alone: int = 16, texts: int = 1000, at_once: int = 4, seed: int = 0
) -> Again:
    """At most `alone` requests once more, one at a time, and of at most `texts` completions, `at_once` together, what
    their ids print. `seed` alone decides which.
    """
    chance = random.Random(seed)  # noqa: S311  (a sample, not a secret)
    heard = told(asked)
    different = list({identity(ask): (ask, record) for ask, record in heard}.values())
    printed = await _print(_sample([each for each in heard if each[1].ok], texts, chance), server, at_once)
    return Again(printed=printed, alone=await _ask_alone(_sample(different, alone, chance), server))


async def _print(asked: Sequence[Asked], server: Server, at_once: int) -> tuple[tuple[Ask, Record, str], ...]:
    """What the server says that each completion's ids print."""
    waiting, printed = iter(asked), list[tuple[Ask, Record, str]]()

    async def ask_on() -> None:
        for ask, record in waiting:
            # The id that ends a completion prints nothing, whatever its text is elsewhere.
            ids = record.token_ids[:-1] if record.finish_reason == FinishReason.STOP_TOKEN else record.token_ids
            text = await server.detokenize(ids) if ids else ""
            if text is None:
                return
            printed.append((ask, record, text))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(ask_on())
    return tuple(printed)


async def _ask_alone(asked: Sequence[Asked], server: Server) -> tuple[tuple[Ask, Record, Answer], ...]:
    """Each again, with nobody beside it, as far as its client listened; until one is not answered."""

    async def read_on(tokens: int) -> None: ...

    again = []
    for ask, record in asked:
        tokens = ask.max_tokens if record.ok else len(record.token_ids)
        alone = replace(ask, conduct=Conduct.NORMAL, cancel_after=0, pause_s=0.0, max_tokens=tokens)
        answer = await server.send(alone, read_on)
        again.append((ask, record, answer))
        if answer.status not in (OK, PROTOCOL):
            break
    return tuple(again)


def _sample(all_of_them: Sequence[T], most: int, chance: random.Random) -> Sequence[T]:
    return chance.sample(all_of_them, min(most, len(all_of_them)))
