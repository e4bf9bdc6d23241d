"""Prompts that are there already, from a file of JSON objects, one a line or in one array. Each holds one of

    {"prompt": "Once upon", "max_tokens": 64}            max_tokens may be left out
    {"prompt": [12, 7, 99]}                              token ids
    {"text": "Once upon"}
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because it rains."}]}

The last is ShareGPT's layout. Its first human turn is the prompt, and the answer's length is what is asked for: here 17
characters, 4 tokens. Real files hold conversations without a first question or answer; these are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, Prompt, estimated_tokens
from tramontane.client.loadtest.load.entries import BadEntry, Entry, read_entries

MAX_PROMPTS = 100_000
"""Read from one file; what comes after them is left."""
MAX_CHARACTERS = 256 << 20
"""Of all of a file's prompts together."""


class Given(NamedTuple):
    """One prompt of a file."""

    prompt: Prompt
    tokens: int
    """Exact for ids; of a text estimated, with its BOS."""
    max_tokens: int | None
    """None where the file does not say."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file's prompts, in its order."""

    prompts: tuple[Given, ...]
    name: str
    characters_per_token: float = CHARACTERS_PER_TOKEN
    passed_over: int = 0
    """Conversations without a question and its answer."""

    def __str__(self) -> str:
        passed_over = f" ({self.passed_over:,} passed over)" if self.passed_over else ""
        return f"{len(self.prompts):,} prompts of {self.name}{passed_over}"


def read_prompt_file(path: Path, characters_per_token: float = CHARACTERS_PER_TOKEN) -> PromptFile:
    """The first 100,000 prompts of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: an entry is none of the layouts, or there is no prompt at all.
    """
    prompts: list[Given] = []
    passed_over = held = 0
    for entry in read_entries(path):
        given = _given(entry, path, characters_per_token)
        if given is None:
            passed_over += 1
            continue
        prompts.append(given)
        held += len(given.prompt)
        if held > MAX_CHARACTERS:
            raise ValueError(f"{path} holds more than {MAX_CHARACTERS:,} characters of prompts; take a part of it")
        if len(prompts) == MAX_PROMPTS:
            break
    if not prompts:
        raise ValueError(f"{path} holds no prompt; {passed_over:,} conversations have no question and answer")
    return PromptFile(tuple(prompts), str(path), characters_per_token, passed_over)


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Layout(msgspec.Struct):
    prompt: str | list[int] | None = None
    text: str | None = None
    conversations: list[_Turn] | None = None
    max_tokens: int | None = None


def _given(entry: Entry, path: Path, characters_per_token: float) -> Given | None:
    """The entry's prompt; None for a conversation that has none."""
    layout = convert(entry, path, _Layout)
    if layout.max_tokens is not None and layout.max_tokens < 1:
        raise BadEntry(path, entry.line, f"max_tokens is {layout.max_tokens}; it must be at least 1")
    if layout.conversations is not None:
        question, answer = _first_exchange(layout.conversations)
        if not question.strip() or not answer.strip():
            return None
        prompt: Prompt = question
        max_tokens = layout.max_tokens or estimated_tokens(answer, characters_per_token)
    else:
        prompt = prompt_of(layout.prompt if layout.prompt is not None else layout.text, path, entry.line)
        max_tokens = layout.max_tokens
    return Given(prompt, prompt_tokens(prompt, characters_per_token), max_tokens)


def _first_exchange(turns: list[_Turn]) -> tuple[str, str]:
    """The first human turn and the model's next one; empty where there is none."""
    for turn, reply in pairwise(turns):
        if turn.speaker in ("human", "user"):
            return turn.value, reply.value if reply.speaker in ("gpt", "assistant", "chatgpt", "bing", "bard") else ""
    return "", ""


def convert(entry: Entry, path: Path, layout: type[Any]) -> Any:
    """The entry as a Struct; keys that it does not know are passed over."""
    try:
        return msgspec.convert(entry.value, layout)
    except msgspec.ValidationError as error:
        raise BadEntry(path, entry.line, str(error)) from None


def prompt_of(value: str | list[int] | None, path: Path, line: int) -> Prompt:
    """A prompt that can be sent: not missing, not empty, text without halves of characters, ids of 32 bits."""
    if value is None:
        raise BadEntry(path, line, "has neither prompt nor text nor conversations")
    if not value:
        raise BadEntry(path, line, "prompt is empty; it needs at least 1 token")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problem = f"prompt holds the lone surrogate U+{ord(value[error.start]):04X}, which cannot be sent"
            raise BadEntry(path, line, problem) from None
        return value
    for token_id in value:
        if not 0 <= token_id < 1 << 32:
            raise BadEntry(path, line, f"prompt holds {token_id}; a token id lies in 0 .. 2^32 - 1")
    return tuple(value)


def prompt_tokens(prompt: Prompt, characters_per_token: float) -> int:
    """Exact for ids; for text the estimate and one for the BOS that the server puts before it."""
    return estimated_tokens(prompt, characters_per_token) + 1 if isinstance(prompt, str) else len(prompt)
