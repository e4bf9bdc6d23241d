"""What is asked: the requests of a plan, all decided by options and a seed.

Request k is the same whatever the number of requests, the rate and the misbehaviour of others, so that the levels of a
sweep, two servers, or a short and a long run differ in nothing else. With `distinct` 3 there are three requests, and
number 7 repeats number 1: same prompt, same options, same seed, hence the same tokens from a server that is right.

`fitting.py` says what becomes of lengths that do not fit the model's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from tramontane.client.loadtest.load.corpus import Prompt, Source, SyntheticText
from tramontane.client.loadtest.load.counting import Counts, counted, most_tokens, uncertain
from tramontane.client.loadtest.load.fitting import DEFAULT_LENGTH, fitted, fitting, needed
from tramontane.client.loadtest.load.misbehaviour import misbehave
from tramontane.client.loadtest.load.prompt_file import PromptFile
from tramontane.client.loadtest.load.streams import Stream, generator
from tramontane.client.loadtest.load.workload import Made, Workload
from tramontane.client.loadtest.plan import Ask

MAX_REQUESTS = 1_000_000
SEED_BITS = 31
"""Of a request's seed: it fits the narrowest field among servers."""
MAX_HELD = 200_000_000
"""Tokens of a plan's different prompts together: about 1.6 GB of ids."""
NOTHING_COUNTED: Counts = MappingProxyType({})


def texts_to_count(workload: Workload, seed: int, context: int | None) -> list[str]:
    """What the server's tokenizer must count before it is known which of a file's prompts fit."""
    if not isinstance(workload.source, PromptFile):
        return []
    prefixes = _file_prefixes(workload, workload.source, seed)
    before = max(map(most_tokens, prefixes), default=0)
    completion, whole = workload.completion, context or 0
    # What an open tail leaves depends on the prompt's length, so that every prompt is counted, as prefixes are.
    open_tail = completion is not None and completion.maximum is None
    others = (whole if open_tail else before + needed(given, completion) for given in workload.source.prompts)
    prompts = zip((given.prompt for given in workload.source.prompts), others, strict=True)
    return uncertain([*prompts, *((prefix, whole) for prefix in prefixes)], context)


def fitted_to(
    workload: Workload, seed: int, *, vocabulary: int | None, context: int | None, counts: Counts = NOTHING_COUNTED
) -> Workload:
    """The workload with those prompts of its file alone that the model can be asked.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(workload.source, PromptFile):
        return workload
    prefixes = _file_prefixes(workload, workload.source, seed)
    file = fitting(
        workload.source,
        workload.completion,
        _before(workload, prefixes, counts),
        vocabulary=vocabulary,
        context=context,
        counts=counts,
        text_only=bool(prefixes),
    )
    return replace(workload, source=file)


def make_asks(
    workload: Workload,
    count: int,
    seed: int,
    *,
    vocabulary: int | None,
    context: int | None,
    counts: Counts = NOTHING_COUNTED,
) -> tuple[Ask, ...]:
    """Requests 0 .. count - 1.

    `vocabulary` and `context` are the model's, in tokens; None where the server does not tell.

    Raises:
        ValueError: lengths do not fit the context, the source cannot make a prompt, or the plan is too large.
    """
    workload = fitted_to(workload, seed, vocabulary=vocabulary, context=context, counts=counts)
    if not 0 <= count <= MAX_REQUESTS:
        raise ValueError(f"requests are {count:,}; they must be 0 .. {MAX_REQUESTS:,}")
    different = count if workload.distinct is None else min(count, workload.distinct)
    if isinstance(workload.source, PromptFile):
        drafts = _read(workload, workload.source, different, seed, context, counts)
    else:
        drafts = _made(workload, workload.source, different, seed, vocabulary, context)
    seeds = generator(seed, Stream.SEEDS).integers(0, 1 << SEED_BITS, different).tolist()
    asks = []
    for number in range(count):
        draft = drafts[number % different]
        asks.append(
            Ask(
                number=number,
                prompt=draft.prompt,
                max_tokens=draft.max_tokens,
                temperature=workload.temperature,
                top_k=workload.top_k,
                top_p=workload.top_p,
                seed=seeds[number % different],
                stop=workload.stop,
                ignore_eos=draft.length_is_said if workload.ignore_eos is None else workload.ignore_eos,
            )
        )
    return misbehave(asks, workload.misbehave, seed, pause_s=workload.pause_s, vocabulary=vocabulary, context=context)


class _Draft(NamedTuple):
    """What decides a request's work."""

    prompt: Prompt
    max_tokens: int
    length_is_said: bool
    """The workload or its file fixes the completion's length: it shall not end before."""


def _made(
    workload: Workload, source: Made, count: int, seed: int, vocabulary: int | None, context: int | None
) -> list[_Draft]:
    """Prompts of drawn lengths."""
    completion = workload.completion or DEFAULT_LENGTH
    lengths = list(
        zip(
            workload.prompt.sample(generator(seed, Stream.PROMPT_LENGTHS), count),
            completion.sample(generator(seed, Stream.COMPLETION_LENGTHS), count),
            strict=True,
        )
    )
    if context is not None:
        before = workload.prefix_tokens + source.is_text  # the server's BOS
        lengths = fitted(lengths, workload.prompt, completion, before, context)
    _check_held(sum(tokens for tokens, _ in lengths) + count * workload.prefix_tokens)
    prefixes = _prefixes(workload, source, seed, vocabulary)
    drafts = []
    for number, (tokens, max_tokens) in enumerate(lengths):
        prompt = source.prompt(generator(seed, Stream.PROMPTS, number), tokens, vocabulary)
        drafts.append(_Draft(_prefixed(prefixes, number, prompt), max_tokens, length_is_said=True))
    return drafts


def _read(
    workload: Workload, file: PromptFile, count: int, seed: int, context: int | None, counts: Counts
) -> list[_Draft]:
    """The file's prompts, all of which fit, in an order drawn from the seed, over and over."""
    _check_held(count * workload.prefix_tokens)
    completion = workload.completion
    order = generator(seed, Stream.ORDER).permutation(len(file.prompts)).tolist()
    lengths = None if completion is None else completion.sample(generator(seed, Stream.COMPLETION_LENGTHS), count)
    prefixes = _file_prefixes(workload, file, seed)
    before = _before(workload, prefixes, counts)
    drafts = []
    for number in range(count):
        given = file.prompts[order[number % len(file.prompts)]]
        max_tokens = lengths[number] if lengths else given.max_tokens or DEFAULT_LENGTH.tokens
        if context is not None:
            max_tokens = min(max_tokens, context - before - given.tokens)  # an open tail
        said = completion is not None or given.max_tokens is not None
        drafts.append(_Draft(_prefixed(prefixes, number, given.prompt), max_tokens, said))
    return drafts


def _file_prefixes(workload: Workload, file: PromptFile, seed: int) -> tuple[Prompt, ...]:
    return _prefixes(workload, SyntheticText(file.characters_per_token), seed, None)


def _before(workload: Workload, prefixes: Sequence[Prompt], counts: Counts) -> int:
    """Tokens ahead of a file's prompt, by the longest prefix."""
    return max((counted(prefix, counts, workload.prefix_tokens) for prefix in prefixes), default=0)


def _prefixes(workload: Workload, source: Source, seed: int, vocabulary: int | None) -> tuple[Prompt, ...]:
    return tuple(
        source.prompt(generator(seed, Stream.PREFIXES, number), workload.prefix_tokens, vocabulary)
        for number in range(workload.prefixes)
    )


def _prefixed(prefixes: Sequence[Prompt], number: int, prompt: Prompt) -> Prompt:
    if not prefixes:
        return prompt
    prefix = prefixes[number % len(prefixes)]
    if isinstance(prefix, str):
        assert isinstance(prompt, str), f"prompt {number} is ids, its prefix text"
        return f"{prefix} {prompt}"
    assert not isinstance(prompt, str), f"prompt {number} is text, its prefix ids"
    return prefix + prompt


def _check_held(tokens: int) -> None:
    if tokens > MAX_HELD:
        raise ValueError(
            f"prompts hold {tokens:,} tokens together; they must be at most {MAX_HELD:,}: "
            "ask for fewer or shorter requests, or for `distinct` ones that repeat"
        )
