"""What becomes of lengths that do not fit the model's context. None that was asked for is cut in silence.

Fixed and uniform lengths, and log-normal ones with a `max`, fit or are refused:

    context 4,096; prompts 4,000, completions uniform:32-128     ValueError: 4,000 + 128 are needed

Only an open log-normal tail is cut, and the report says so: a prompt where it leaves too little for the completion (its
greatest length, or an open one's median), a completion where the context ends.

    context 1,000; prompts log-normal, completions 128           a prompt of 950 becomes 872

A file's prompts that do not fit are left out. The tokens of a text are estimates, so that one which fits here may still
be a little too long for the server.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from tramontane.client.loadtest.load.lengths import Fixed, Lengths, LogNormal
from tramontane.client.loadtest.load.prompt_file import Given, PromptFile

DEFAULT_LENGTH = Fixed(128)
"""Of completions and of prompts that are made, where nothing else is said."""


def fitted(
    drawn: Iterable[tuple[int, int]], prompt: Lengths, completion: Lengths, before: int, context: int
) -> list[tuple[int, int]]:
    """Drawn lengths of prompts and completions with open tails cut.

    `before` are the tokens ahead of each prompt, prefix and BOS. All three together never exceed the context.

    Raises:
        ValueError: what is no open tail does not fit.
    """
    room = context - before
    needed = _needed(prompt) + _needed(completion)
    if needed > room:
        raise ValueError(
            f"prompts of {_needed(prompt):,} tokens after {before:,} of prefix and BOS, and completions of "
            f"{_needed(completion):,}, need {before + needed:,} together; the context is {context:,}"
        )
    reserved = _needed(completion)
    if isinstance(completion, LogNormal) and completion.maximum is None:
        reserved = ceil(completion.median)
    longest = max(_needed(prompt), room - reserved)
    return [(min(asked, longest), min(tokens, room - min(asked, longest))) for asked, tokens in drawn]


def fitting(file: PromptFile, completion: Lengths | None, before: int, context: int | None) -> list[Given]:
    """The file's prompts that leave room for their completion.

    Raises:
        ValueError: there is none.
    """
    usable = []
    for given in file.prompts:
        needed = (given.max_tokens or DEFAULT_LENGTH.tokens) if completion is None else _needed(completion)
        if context is None or before + given.tokens + needed <= context:
            usable.append(given)
    if not usable:
        raise ValueError(
            f"{file.name} holds no prompt that fits, with {before} tokens of prefix and its completion, "
            f"into the context of {context:,}"
        )
    return usable


def _needed(lengths: Lengths) -> int:
    """What must fit: the greatest length, or the least one where the tail is open."""
    return lengths.minimum if lengths.maximum is None else lengths.maximum
