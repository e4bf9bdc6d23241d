"""Prompts that are there already, from a file of JSON objects, one a line or in one array, or from a table. Each is one
of

    {"prompt": "Once upon", "max_tokens": 64}            max_tokens may be left out
    {"prompt": [12, 7, 99]}                              token ids
    {"text": "Once upon"}
    {"messages": [{"role": "user", "content": "Why?"}]}
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because it rains."}]}

or the same under others' names (`names.py`). Of a conversation the first question is the prompt, and where an answer
follows, its length is what is asked for: here 17 characters, 4 tokens. ShareGPT's need an answer, since nothing else
says how long it shall be; real files hold some without a question or an answer. What cannot be used is passed over and
counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, Prompt, estimated_tokens
from tramontane.client.loadtest.load.entries import read_entries
from tramontane.client.loadtest.load.lengths import MAX_LENGTH
from tramontane.client.loadtest.load.names import Names, Written, unread_sentence
from tramontane.client.loadtest.load.passed_over import NOTHING, PassedOver, Tally, Unusable
from tramontane.client.loadtest.texts import mended, plain, unsendable

MAX_PROMPTS = 100_000
"""Read from one file; what comes after them is left."""
MAX_CHARACTERS = 256 << 20
"""Of all of a file's prompts together, likewise."""

PROMPT_NAMES = ("prompt", "messages", "conversations", "max_tokens")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard", "model")


class Given(NamedTuple):
    """One prompt of a file."""

    prompt: Prompt
    tokens: int
    """Exact for ids; of a text estimated, with its BOS."""
    max_tokens: int | None
    """None where the file does not say."""
    line: int = 0
    """Where it stands."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file's prompts, in its order."""

    prompts: tuple[Given, ...]
    name: str
    characters_per_token: float = CHARACTERS_PER_TOKEN
    passed_over: PassedOver = NOTHING
    notes: tuple[str, ...] = ()
    """What the reader of a report must know of the file, beside what was passed over."""

    def __str__(self) -> str:
        return f"{len(self.prompts):,} prompt{'s' * (len(self.prompts) != 1)} of {self.name}"


def read_prompt_file(path: Path, characters_per_token: float = CHARACTERS_PER_TOKEN) -> PromptFile:
    """The first 100,000 prompts of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds nothing that can be used.
    """
    names, tally, name = Names(PROMPT_NAMES), Tally(), mended(str(path))
    prompts: list[Given] = []
    notes: list[str] = []
    held = 0
    for line, value, _ in read_entries(path, tally, names.is_head):
        try:
            given = _given(names.read(value), line, characters_per_token)
        except Unusable as unusable:
            tally.add(str(unusable), line)
            continue
        held += len(given.prompt)
        if len(prompts) == MAX_PROMPTS or held > MAX_CHARACTERS:
            limit = f"{MAX_PROMPTS:,} prompts or {MAX_CHARACTERS:,} characters of them"
            notes.append(f"{name} was read up to line {line:,}, where the limit of {limit} lies")
            break
        prompts.append(given)
    if not prompts:
        raise ValueError("; ".join((f"{name} holds no prompt", *tally.passed_over.sentences(name))))
    if names.unread:
        notes.append(unread_sentence(names.unread, path))
    return PromptFile(tuple(prompts), name, characters_per_token, tally.passed_over, tuple(notes))


def _given(written: Written, line: int, characters_per_token: float) -> Given:
    """The entry's prompt. Raises Unusable."""
    prompt, answer = prompt_and_answer(written)
    max_tokens = written.max_tokens
    if max_tokens is not None:
        check_length("max_tokens", max_tokens)
    elif answer.strip():
        max_tokens = estimated_tokens(answer, characters_per_token)
    elif written.conversations is not None:
        raise Unusable("the conversation has no question with an answer")
    return Given(prompt, prompt_tokens(prompt, characters_per_token), max_tokens, line)


def prompt_and_answer(written: Written) -> tuple[Prompt, str]:
    """What the entry asks, in whichever way it says so, and what it was answered; empty where that is not told.

    Raises:
        Unusable: it asks nothing that can be sent.
    """
    if written.prompt is not None:
        return checked_prompt(written.prompt), ""
    turns = written.messages if written.messages is not None else written.conversations
    if turns is None:
        raise Unusable("it has neither prompt nor text nor a conversation")
    question, answer = _first_exchange(turns)
    if not question.strip():
        raise Unusable("the conversation has no question with an answer")
    return checked_prompt(question), answer


def _first_exchange(turns: object) -> tuple[str, str]:
    """The first human turn and the model's next one; empty where there is none."""
    if not isinstance(turns, list):
        return "", ""
    said = [(_speaker(turn), plain(turn)) for turn in turns if isinstance(turn, dict)]
    for (speaker, words), (reply_speaker, reply) in pairwise((*said, ("", ""))):
        if speaker in _ASKS:
            return words, reply if reply_speaker in _ANSWERS else ""
    return "", ""


def _speaker(turn: dict[str, object]) -> str:
    return plain(turn.get("from") or turn.get("role")).lower()


def checked_prompt(value: object) -> Prompt:
    """A prompt that can be sent: not empty, text without halves of characters, or ids of 32 bits. Raises Unusable."""
    if not isinstance(value, str | list):
        raise Unusable("prompt is neither text nor a list of token ids")
    if not value:
        raise Unusable("prompt is empty; it needs at least 1 token")
    if isinstance(value, str):
        if problem := unsendable(value):
            raise Unusable(f"prompt {problem}, which cannot be sent")
        return value
    for token_id in value:
        if type(token_id) is not int or not 0 <= token_id < 1 << 32:
            raise Unusable(f"prompt holds {ascii(token_id)[:40]}; a token id lies in 0 .. 2^32 - 1")
    return tuple(value)


def check_length(field: str, tokens: int) -> None:
    """Raises Unusable for a length that no request can have."""
    if not 1 <= tokens <= MAX_LENGTH:
        raise Unusable(f"{field} is {tokens}; it must lie in 1 .. {MAX_LENGTH:,}")


def prompt_tokens(prompt: Prompt, characters_per_token: float) -> int:
    """Exact for ids; for text the estimate and one for the BOS that the server puts before it."""
    return estimated_tokens(prompt, characters_per_token) + 1 if isinstance(prompt, str) else len(prompt)
