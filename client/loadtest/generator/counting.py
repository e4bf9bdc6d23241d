"""Asks the server's tokenizer how long texts are, before a run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

AT_ONCE = 16


class Tokenizer(Protocol):
    """What counting needs of a `Target`."""

    async def count_tokens(self, text: str) -> int | None:
        """See `Target`."""


async def count_tokens(texts: Sequence[str], server: Tokenizer) -> dict[str, int]:
    """The tokens of each text; one that the server cannot count is left out.

    Raises:
        ConnectionError: the server does not answer.
    """
    waiting, counts = iter(texts), dict[str, int]()

    async def ask_on() -> None:
        for text in waiting:
            tokens = await server.count_tokens(text)
            if tokens is not None:
                counts[text] = tokens

    asking = [asyncio.create_task(ask_on()) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*asking)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return counts
