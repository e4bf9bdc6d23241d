"""Whether prompts fit into the model's context, by the model's own tokenizer where there is one to ask.

A text of n bytes of UTF-8 has at most n tokens, a BOS and the blank that SentencePiece puts before a word. Where even
so many fit there is nothing to ask; of the others the count decides. 2,100 Chinese characters are 6,300 bytes, and may
be 700 tokens of one model and 6,301 of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from tramontane.client.loadtest.load.corpus import Prompt
from tramontane.client.loadtest.plan import Ask, Conduct

Counts: TypeAlias = Mapping[str, int]
"""Texts with their tokens, BOS included, as the server's tokenizer counts."""


def most_tokens(prompt: Prompt) -> int:
    """What the prompt cannot exceed, whatever the tokenizer."""
    return len(prompt.encode()) + 2 if isinstance(prompt, str) else len(prompt)


def uncertain(prompts: Iterable[tuple[Prompt, int]], context: int | None) -> list[str]:
    """The texts among prompts, each with the other tokens it needs room for, of which only a count says if they fit."""
    if context is None:
        return []
    every = (prompt for prompt, others in prompts if most_tokens(prompt) + others > context)
    return list(dict.fromkeys(prompt for prompt in every if isinstance(prompt, str)))


def counted(prompt: Prompt, counts: Counts, estimate: int) -> int:
    """The prompt's tokens: exact for ids, for text as counted, else as estimated."""
    return counts.get(prompt, estimate) if isinstance(prompt, str) else len(prompt)


def check_fit(asks: Iterable[Ask], counts: Counts, context: int | None) -> None:
    """Raises ValueError where a text that was made is longer than its characters let one believe."""
    for ask in asks:
        if context is None or ask.conduct is Conduct.BAD or not isinstance(ask.prompt, str):
            continue
        tokens = counts.get(ask.prompt, 0)
        if tokens + ask.max_tokens > context:
            ratio = len(ask.prompt) / tokens
            raise ValueError(
                f"the prompt of request {ask.number} is {tokens:,} tokens to the server's tokenizer and max_tokens "
                f"{ask.max_tokens:,}; the context is {context:,}: its text has {ratio:.2g} characters a token, which "
                "--characters-per-token can say"
            )
