"""What others call the same thing: the keys of recorded prompts and traces, in their dialects.

    {"prompt": "Why?", "max_tokens": 64}                                  ours
    {"prompt": "Why?", "output_tokens": 64}                               vLLM's
    {"text_input": "Why?", "output_length": 64, "timestamp": 27000}       Mooncake's, as AIPerf writes it
    {"conversations": [{"from": "human", "value": "Why?"}, ...]}          ShareGPT's
    {"messages": [{"role": "user", "content": "Why?"}, ...]}              OpenAI's
    Timestamp,Model,Request tokens,Response tokens,...                    BurstGPT's
    TIMESTAMP,ContextTokens,GeneratedTokens                               Azure's

Capitals, blanks and underscores make no difference. Keys that nobody asked for are kept by name, for the report.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from tramontane.client.loadtest.load.passed_over import Unusable
from tramontane.client.loadtest.texts import mended

_NAMES = {
    "prompt": ("prompt", "text_input", "input_text", "text"),
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
    "prompt_tokens": (
        "prompt_tokens",
        "input_length",
        "input_tokens",
        "prompt_len",
        "request_tokens",
        "context_tokens",
        "num_prefill_tokens",
    ),
    "max_tokens": (
        "max_tokens",
        "output_tokens",
        "output_length",
        "output_len",
        "expected_output_len",
        "max_completion_tokens",
        "max_new_tokens",
        "response_tokens",
        "generated_tokens",
        "num_decode_tokens",
    ),
    "at_s": ("at_s", "arrived_at"),
    "timestamp": ("timestamp",),
    "delay": ("delay",),
    "session": ("session_id",),
    "temperature": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "seed": ("seed",),
    "stop": ("stop",),
    "ignore_eos": ("ignore_eos",),
    "conduct": ("conduct",),
}
"""Our name, and all names for it; of two in one entry the first that is not null counts."""
MAX_UNREAD = 12
"""Keys that are remembered as not read."""
MAX_DIALECTS = 1000
"""Sets of keys that are remembered."""


class Written(msgspec.Struct, kw_only=True):
    """One entry under our names. What it does not say, or says with null, is None."""

    prompt: Any = None
    conversations: Any = None
    messages: Any = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    at_s: float | None = None
    timestamp: float | str | None = None
    delay: float | None = None
    session: Any = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    ignore_eos: bool | None = None
    conduct: str | None = None


assert _NAMES.keys() == set(Written.__struct_fields__)


class Names:
    """Reads entries under our names, and remembers which keys it did not read."""

    def __init__(self, wanted: Collection[str], known: Iterable[str] = ()) -> None:
        """`wanted` are names of `Written`; `known` are keys that decide nothing and are not worth a word."""
        self._places = {_plain(name): (rank, ours) for ours in wanted for rank, name in enumerate(_NAMES[ours])}
        self._known = set(map(_plain, known))
        self._unread: dict[str, None] = {}
        self._dialects: dict[tuple[str, ...], dict[str, list[str]]] = {}

    def is_head(self, cells: Sequence[str]) -> bool:
        """Whether these are the names of a table's columns."""
        return any(_plain(cell) in self._places for cell in cells)

    def read(self, value: Mapping[str, Any]) -> Written:
        """One entry. Numbers may be text, as they are in tables.

        Raises:
            Unusable: a value is of another kind.
        """
        theirs = self._theirs(tuple(value))
        keys = {
            ours: key
            for ours, names in theirs.items()
            if (key := next((name for name in names if value[name] is not None), None)) is not None
        }
        self._note_unread(value.keys() - keys.values() - self._unread.keys(), value)
        try:
            return msgspec.convert({ours: value[key] for ours, key in keys.items()}, Written, strict=False)
        except msgspec.ValidationError as error:
            raise Unusable(_in_their_words(str(error), keys)) from None

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that were not read, in the order in which they came up."""
        return tuple(self._unread)

    def _theirs(self, keys: tuple[str, ...]) -> dict[str, list[str]]:
        """Our names with the keys that mean the same, the best first. Most entries of a file have the same keys."""
        if keys not in self._dialects:
            if len(self._dialects) >= MAX_DIALECTS:
                self._dialects.clear()
            found: dict[str, list[str]] = {}
            known = [key for key in keys if _plain(key) in self._places]
            for key in sorted(known, key=lambda key: self._places[_plain(key)]):
                found.setdefault(self._places[_plain(key)][1], []).append(key)
            self._dialects[keys] = found
        return self._dialects[keys]

    def _note_unread(self, keys: Iterable[str], value: Mapping[str, Any]) -> None:
        for key in sorted(keys, key=list(value).index):
            if value[key] is not None and _plain(key) not in self._known and len(self._unread) < MAX_UNREAD:
                self._unread[key] = None


def unread_sentence(keys: Sequence[str], path: Path) -> str:
    """For the report."""
    said = ", ".join(ascii(key[:40]) for key in keys)
    return f"keys of {mended(path.name)} that were not read: {said}{' and others' if len(keys) >= MAX_UNREAD else ''}"


@lru_cache(maxsize=1024)
def _plain(key: str) -> str:
    return re.sub(r"[\s_-]", "", key).lower()


def _in_their_words(problem: str, keys: Mapping[str, str]) -> str:
    """msgspec's sentence under the file's own key: "Expected `int | null`, got `str` - at `$.output_length`"."""
    return re.sub(r"\$\.(\w+)", lambda found: f"$.{keys.get(found[1], found[1])}", problem)
