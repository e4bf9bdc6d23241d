"""Replays a trace: arrivals and requests as they were recorded, from a file of JSON objects, one a line or in one
array, or of a table (CSV). Each is one of

    {"at_s": 1.25, "prompt": "Once upon", "max_tokens": 64}             or "prompt": [12, 7, 99]
    {"at_s": 1.25, "prompt_tokens": 512, "max_tokens": 64}              a random prompt of that length
    {"timestamp": 27000, "input_length": 512, "output_length": 64}      Mooncake's layout
    27,ChatGPT,512,64                                                   BurstGPT's, under a head of names

or the same under others' names (`names.py`). The first arrival is the run's start, for recorded times are not times of
the run: of 25000, 26000 and 26500 ms come 0, 1 and 1.5 s. Lines may stand in any order; at speed 2 the arrival at
1.5 s comes at 0.75 s.

The requests file that a run of ours writes is such a trace. Of its other keys those are read that decide a request's
tokens (`temperature`, `top_k`, `top_p`, `seed`, `stop`, `ignore_eos`), and `conduct`, to leave out requests that had to
be refused: what was wrong with them is not in the file. Beginnings that prompts shared (Mooncake's `hash_ids`) are not
kept. What cannot be used is passed over and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tramontane.client.loadtest.load.asks import MAX_HELD, MAX_REQUESTS, NOTHING_COUNTED, SEED_BITS
from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, Prompt, RandomIds, SyntheticText
from tramontane.client.loadtest.load.counting import Counts, counted, uncertain
from tramontane.client.loadtest.load.entries import read_entries
from tramontane.client.loadtest.load.fitting import check_ids, check_room
from tramontane.client.loadtest.load.names import Names, Written, unread_sentence
from tramontane.client.loadtest.load.passed_over import NOTHING, PassedOver, Tally, Unusable
from tramontane.client.loadtest.load.prompt_file import check_length, prompt_and_answer, prompt_tokens
from tramontane.client.loadtest.load.recorded_times import (
    Kind,
    Moment,
    Unit,
    in_seconds,
    moment_words,
    read_moment,
    unit_of,
)
from tramontane.client.loadtest.load.streams import Stream, generator
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.texts import mended, unsendable

MAX_SPAN_S = 31 * 86_400.0
"""A month. What lies farther from the trace's middle is no arrival of the same run."""

_READ = (
    *("at_s", "timestamp", "delay", "session", "prompt", "messages", "conversations", "prompt_tokens", "max_tokens"),
    *("temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "conduct"),
)
_OUTCOMES = (
    *("number", "sent_s", "first_token_s", "ended_s", "status", "error", "finish_reason", "completion_tokens"),
    *("ttft_ms", "e2el_ms", "itls_ms", "message_tokens", "server", "ids_sha256", "text"),
)
"""What a requests file of ours says besides: it decides nothing."""


class Line(NamedTuple):
    """One request as it was recorded."""

    number: int
    """Of its line in the file."""
    at_s: float
    """By the trace's own clock."""
    prompt: Prompt | None
    """None: it is drawn."""
    prompt_tokens: int
    """Exact, but of text estimated."""
    max_tokens: int
    written: Written


@dataclass(frozen=True, slots=True)
class Recording:
    """A trace as its file has it, in order of arrival."""

    name: str
    lines: tuple[Line, ...]
    passed_over: PassedOver = NOTHING
    dated: bool = False
    """Its times are dates."""
    notes: tuple[str, ...] = ()
    """What the reader of a report must know of the file, beside what was passed over."""

    def texts_to_count(self, context: int | None) -> list[str]:
        """What the server's tokenizer must count before it is known which requests fit."""
        return uncertain(((each.prompt, each.max_tokens) for each in self.lines if each.prompt is not None), context)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    arrivals_s: tuple[float, ...]
    """From the run's start, which is the first of them."""
    asks: tuple[Ask, ...]
    start: str = ""
    """When the first arrival was by the trace's own clock; empty where that said 0."""
    notes: tuple[str, ...] = ()


def read_trace(path: Path, unit: Unit = Unit.AUTO, characters_per_token: float = CHARACTERS_PER_TOKEN) -> Recording:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds nothing that can be used, or too much.
    """
    names, tally, name = Names(_READ, _OUTCOMES), Tally(), mended(str(path))
    lines: list[Line] = []
    moments: list[Moment] = []
    held, in_table = 0, False
    for entry in read_entries(path, tally, names.is_head):
        number, in_table = entry.line, entry.in_table
        try:
            written = names.read(entry.value)
            if written.conduct == Conduct.BAD:
                continue
            moment = read_moment(written)
            line = _line(number, written, characters_per_token)
        except Unusable as unusable:
            tally.add(str(unusable), number)
            continue
        lines.append(line)
        moments.append(moment)
        held += line.prompt_tokens if line.prompt is None else len(line.prompt)
        if len(lines) > MAX_REQUESTS or held > MAX_HELD:
            problem = f"is past {MAX_REQUESTS:,} requests or {MAX_HELD:,} tokens of prompts; take a part of the trace"
            raise ValueError(f"{name}, line {number:,}: {problem}")
    if not lines:
        raise ValueError("; ".join((f"{name} holds no request", *tally.passed_over.sentences(name))))
    notes = [unread_sentence(names.unread, path)] if names.unread else []
    if unit is Unit.AUTO:
        unit = unit_of(moments, in_table=in_table)
        if unit is Unit.S and not in_table:
            notes.append(f"timestamps of {mended(path.name)} were read as seconds, for most have fractions")
    times_s = in_seconds(moments, unit)
    placed = sorted((line._replace(at_s=at_s) for line, at_s in zip(lines, times_s, strict=True)), key=_at_s)
    dated = all(moment.kind is Kind.DATE for moment in moments)
    return Recording(name, tuple(placed), tally.passed_over, dated, tuple(notes))


def replay(
    recording: Recording,
    seed: int,
    *,
    vocabulary: int | None,
    context: int | None,
    speed: float = 1.0,
    characters_per_token: float = CHARACTERS_PER_TOKEN,
    counts: Counts = NOTHING_COUNTED,
) -> Trace:
    """The recorded requests that this model can be asked. Prompts that the trace does not hold are drawn from the seed:
    ids, or text without a vocabulary.

    Raises:
        ValueError: there is none, or the speed is not above 0.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed is {speed:g}; it must be above 0 and finite")
    tally = Tally(recording.passed_over)
    middle_s = recording.lines[len(recording.lines) // 2].at_s
    usable: list[Line] = []
    for line in recording.lines:
        try:
            if abs(line.at_s - middle_s) > MAX_SPAN_S * speed:
                raise Unusable(f"it came at {line.at_s:.15g} s, more than 31 days away from the others")
            tokens = line.prompt_tokens
            if line.prompt is not None:
                check_ids(line.prompt, vocabulary)
                tokens = counted(line.prompt, counts, tokens)
            check_room(tokens, line.max_tokens, context)
        except Unusable as unusable:
            tally.add(str(unusable), line.number)
        else:
            usable.append(line)
    sentences = tally.passed_over.sentences(recording.name)
    if not usable:
        raise ValueError("; ".join((f"{recording.name} holds no request that this model can be asked", *sentences)))
    first_s = usable[0].at_s
    source = SyntheticText(characters_per_token) if vocabulary is None else RandomIds()

    def prompt(number: int, line: Line) -> Prompt:
        if line.prompt is not None:
            return line.prompt
        return source.prompt(generator(seed, Stream.PROMPTS, number), line.prompt_tokens, vocabulary)

    return Trace(
        arrivals_s=tuple((line.at_s - first_s) / speed for line in usable),
        asks=tuple(_ask(number, line, prompt(number, line), seed) for number, line in enumerate(usable)),
        start=moment_words(first_s, dated=recording.dated) if first_s else "",
        notes=(*recording.notes, *sentences),
    )


def _line(number: int, written: Written, characters_per_token: float) -> Line:
    """A request but for its time. Raises Unusable."""
    prompt, tokens = None, written.prompt_tokens
    if not written.prompt is written.messages is written.conversations is None:
        prompt, _ = prompt_and_answer(written)
        tokens = prompt_tokens(prompt, characters_per_token)
    for field, length in (("max_tokens", written.max_tokens), ("prompt_tokens", tokens)):
        if length is None:
            raise Unusable(f"it has no {field}")
        check_length(field, length)
    for field, value, least, beyond in (
        ("temperature", written.temperature, 0, math.inf),
        ("top_k", written.top_k, 0, 1 << 32),
        ("top_p", written.top_p, 1e-9, 1 + 1e-9),
        ("seed", written.seed, 0, 1 << 64),
    ):
        if value is not None and not least <= value < beyond:
            raise Unusable(f"{field} is {value}, which no request can have")
    for stop in _stops(written):
        if problem := unsendable(stop):
            raise Unusable(f"stop {problem}, which cannot be sent")
    assert tokens is not None
    assert written.max_tokens is not None
    return Line(number, 0.0, prompt, tokens, written.max_tokens, written)


def _ask(number: int, line: Line, prompt: Prompt, seed: int) -> Ask:
    """The line's request, with what the line leaves open drawn by its number."""
    written = line.written
    drawn = int(generator(seed, Stream.SEEDS, number).integers(0, 1 << SEED_BITS))
    return Ask(
        number=number,
        prompt=prompt,
        max_tokens=line.max_tokens,
        temperature=written.temperature or 0.0,
        top_k=written.top_k,
        top_p=written.top_p,
        stop=_stops(written),
        seed=drawn if written.seed is None else written.seed,
        ignore_eos=line.prompt is None if written.ignore_eos is None else written.ignore_eos,
    )


def _stops(written: Written) -> tuple[str, ...]:
    return (written.stop,) if isinstance(written.stop, str) else written.stop or ()


def _at_s(line: Line) -> float:
    return line.at_s
