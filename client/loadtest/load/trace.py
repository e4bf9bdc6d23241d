"""Replays a trace: arrivals and requests as they were recorded, from a file of JSON objects, one a line. Each is one of

    {"at_s": 1.25, "prompt": "Once upon", "max_tokens": 64}             or "prompt": [12, 7, 99]
    {"at_s": 1.25, "prompt_tokens": 512, "max_tokens": 64}              a random prompt of that length
    {"timestamp": 1250, "input_length": 512, "output_length": 64}       Mooncake's layout, in milliseconds

The requests file that a run of ours writes is such a trace. Of its other keys those are read that decide a request's
tokens (`temperature`, `top_k`, `top_p`, `seed`, `stop`, `ignore_eos`), and `conduct`, to leave out requests that had to
be refused: what was wrong with them is not in the file. Beginnings that prompts shared (Mooncake's `hash_ids`) are not
kept.

Lines may stand in any order. At speed 2 the arrival at 1.25 s comes at 0.625 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import msgspec

from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, Prompt, RandomIds, SyntheticText
from tramontane.client.loadtest.load.entries import BadEntry, read_entries
from tramontane.client.loadtest.load.lengths import MAX_LENGTH
from tramontane.client.loadtest.load.prompt_file import convert, prompt_of
from tramontane.client.loadtest.load.streams import Stream, generator
from tramontane.client.loadtest.load.workload import MAX_HELD, MAX_REQUESTS, SEED_BITS
from tramontane.client.loadtest.plan import Ask, Conduct

MAX_AT_S = 31 * 86_400.0
"""A month. Later ones are times of day that were not counted from the trace's start."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    arrivals_s: tuple[float, ...]
    asks: tuple[Ask, ...]


class _Line(msgspec.Struct):
    at_s: float | None = None
    timestamp: float | None = None
    prompt: str | list[int] | None = None
    prompt_tokens: int | None = None
    input_length: int | None = None
    max_tokens: int | None = None
    output_length: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool | None = None
    conduct: str = Conduct.NORMAL


def read_trace(
    path: Path,
    seed: int,
    *,
    vocabulary: int | None,
    context: int | None,
    speed: float = 1.0,
    characters_per_token: float = CHARACTERS_PER_TOKEN,
) -> Trace:
    """A trace's requests. Prompts that it does not hold are drawn from the seed: ids, or text without a vocabulary.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is none of the layouts, does not fit the context, or the whole is too large; or the speed is
            not above 0.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed is {speed:g}; it must be above 0 and finite")
    arrivals: list[tuple[float, int, _Line]] = []
    held = 0
    for entry in read_entries(path):
        line: _Line = convert(entry, path, _Line)
        if line.conduct == Conduct.BAD:
            continue
        arrivals.append((_at_s(line, path, entry.line) / speed, entry.line, line))
        held += line.prompt_tokens or line.input_length or len(line.prompt or "")
        if len(arrivals) > MAX_REQUESTS or held > MAX_HELD:
            problem = f"is past {MAX_REQUESTS:,} requests or {MAX_HELD:,} tokens of prompts; take a part of the trace"
            raise BadEntry(path, entry.line, problem)
    if not arrivals:
        raise ValueError(f"{path} holds no request; it must hold at least 1")
    arrivals.sort(key=itemgetter(0))
    replay = _Replay(path, seed, vocabulary, context, characters_per_token)
    asks = tuple(replay.ask(number, line, where) for number, (_, where, line) in enumerate(arrivals))
    return Trace(tuple(at_s for at_s, _, _ in arrivals), asks)


@dataclass(frozen=True, slots=True)
class _Replay:
    """What turns a line into a request."""

    path: Path
    seed: int
    vocabulary: int | None
    context: int | None
    characters_per_token: float

    def ask(self, number: int, line: _Line, where: int) -> Ask:
        """The line's request, with what the line leaves open drawn by its number."""
        max_tokens = self._length(where, "max_tokens", line.max_tokens, "output_length", line.output_length)
        prompt = self._made(number, line, where) if line.prompt is None else self._given(line.prompt, where)
        if not isinstance(prompt, str) and self.context is not None and len(prompt) + max_tokens > self.context:
            problem = (
                f"a prompt of {len(prompt):,} tokens and max_tokens {max_tokens:,} need {len(prompt) + max_tokens:,}"
            )
            raise BadEntry(self.path, where, f"{problem}; the context is {self.context:,}")
        if not 0 <= line.temperature < math.inf:
            raise BadEntry(self.path, where, f"temperature is {line.temperature:g}; it must be at least 0")
        if line.seed is not None and not 0 <= line.seed < 1 << 64:
            raise BadEntry(self.path, where, f"seed is {line.seed}; it must lie in 0 .. 2^64 - 1")
        return Ask(
            number=number,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=line.temperature,
            top_k=line.top_k,
            top_p=line.top_p,
            stop=line.stop,
            seed=line.seed if line.seed is not None else _drawn_seed(self.seed, number),
            ignore_eos=line.prompt is None if line.ignore_eos is None else line.ignore_eos,
        )

    def _made(self, number: int, line: _Line, where: int) -> Prompt:
        tokens = self._length(where, "prompt_tokens", line.prompt_tokens, "input_length", line.input_length)
        if self.context is not None and tokens >= self.context:  # before a long one is made
            raise BadEntry(self.path, where, f"prompt_tokens is {tokens:,}; the context is {self.context:,}")
        source = SyntheticText(self.characters_per_token) if self.vocabulary is None else RandomIds()
        return source.prompt(generator(self.seed, Stream.PROMPTS, number), tokens, self.vocabulary)

    def _given(self, value: str | list[int], where: int) -> Prompt:
        prompt = prompt_of(value, self.path, where)
        if not isinstance(prompt, str) and self.vocabulary is not None and (highest := max(prompt)) >= self.vocabulary:
            problem = f"prompt holds token id {highest}; it must be below the vocabulary, {self.vocabulary}"
            raise BadEntry(self.path, where, problem)
        return prompt

    def _length(self, where: int, ours: str, value: int | None, other: str, other_value: int | None) -> int:
        """What either layout says."""
        field, tokens = (ours, value) if value is not None else (other, other_value)
        if tokens is None:
            raise BadEntry(self.path, where, f"has neither {ours} nor {other}")
        if not 1 <= tokens <= MAX_LENGTH:
            raise BadEntry(self.path, where, f"{field} is {tokens}; it must lie in 1 .. {MAX_LENGTH:,}")
        return tokens


def _at_s(line: _Line, path: Path, where: int) -> float:
    """When either layout's request comes."""
    if line.at_s is not None:
        field, value, a_second = "at_s", line.at_s, 1
    elif line.timestamp is not None:
        field, value, a_second = "timestamp", line.timestamp, 1000
    else:
        raise BadEntry(path, where, "has neither at_s nor timestamp")
    if not 0 <= value <= MAX_AT_S * a_second:
        raise BadEntry(path, where, f"{field} is {value:.15g}; it must lie in 0 .. {MAX_AT_S * a_second:.15g}")
    return value / a_second


def _drawn_seed(seed: int, number: int) -> int:
    return int(generator(seed, Stream.SEEDS, number).integers(0, 1 << SEED_BITS))
