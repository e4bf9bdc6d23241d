"""What becomes of lengths that do not fit the model's context. None that was asked for is cut in silence.

Fixed and uniform lengths, and log-normal ones with a `max`, fit or are refused:

    context 4,096; prompts 4,000, completions uniform:32-128     ValueError: 4,000 + 128 are needed

Only an open log-normal tail is cut, and the report says so: a prompt where it leaves too little for the completion (its
greatest length, or an open one's median), a completion where the context ends.

    context 1,000; prompts log-normal, completions 128           a prompt of 950 becomes 872

A file's prompts that do not fit are passed over, and counted with what else was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

from tramontane.client.loadtest.load.corpus import Prompt
from tramontane.client.loadtest.load.counting import Counts, counted
from tramontane.client.loadtest.load.lengths import Fixed, Lengths, LogNormal
from tramontane.client.loadtest.load.passed_over import Tally, Unusable
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


def fitting(
    file: PromptFile,
    completion: Lengths | None,
    before: int,
    *,
    vocabulary: int | None,
    context: int | None,
    counts: Counts,
    text_only: bool = False,
) -> PromptFile:
    """The file with those prompts alone that the model can be asked, each with its tokens as they were counted.

    `before` are the tokens ahead of each prompt; with `text_only` they are text, so that ids cannot follow.

    Raises:
        ValueError: there is none.
    """
    tally, usable = Tally(file.passed_over), []
    for each in file.prompts:
        given = each._replace(tokens=counted(each.prompt, counts, each.tokens))
        try:
            check_ids(given.prompt, vocabulary)
            if text_only and not isinstance(given.prompt, str):
                raise Unusable("prompt is token ids, and prefixes go before text only")
            check_room(before + given.tokens, needed(given, completion), context)
        except Unusable as unusable:
            tally.add(str(unusable), given.line)
        else:
            usable.append(given)
    if not usable:
        sentences = tally.passed_over.sentences(file.name)
        raise ValueError("; ".join((f"{file.name} holds no prompt that this model can be asked", *sentences)))
    return replace(file, prompts=tuple(usable), passed_over=tally.passed_over)


def needed(given: Given, completion: Lengths | None) -> int:
    """Tokens that the prompt's completion needs room for."""
    return (given.max_tokens or DEFAULT_LENGTH.tokens) if completion is None else _needed(completion)


def check_ids(prompt: Prompt, vocabulary: int | None) -> None:
    """Raises Unusable for a token id that the model does not have."""
    if not isinstance(prompt, str) and vocabulary is not None and (highest := max(prompt)) >= vocabulary:
        raise Unusable(f"prompt holds token id {highest}; it must be below the vocabulary, {vocabulary}")


def check_room(tokens: int, max_tokens: int, context: int | None) -> None:
    """Raises Unusable where prompt and completion do not fit into the context."""
    if context is not None and tokens + max_tokens > context:
        problem = f"a prompt of {tokens:,} tokens and max_tokens {max_tokens:,} need {tokens + max_tokens:,}"
        raise Unusable(f"{problem}; the context is {context:,}")


def _needed(lengths: Lengths) -> int:
    """What must fit: the greatest length, or the least one where the tail is open."""
    return lengths.minimum if lengths.maximum is None else lengths.maximum
