"""Reads large JSON files entry by entry: one object a line (jsonl), or one array of objects, as ShareGPT's file is.

Never more than one entry is held, and an entry has a limit, so that a file of any size, or the wrong file, costs little
memory. Every error says where it is:

    prompts.jsonl, line 3: JSON is malformed: trailing characters (byte 8)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import msgspec

MAX_ENTRY_CHARACTERS = 16 << 20
CHUNK_CHARACTERS = 1 << 20


class BadEntry(ValueError):  # noqa: N818  (what it is)
    """What a file holds is not what it should be."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")


class Entry(NamedTuple):
    """One object of a file."""

    line: int
    """Where it begins, from 1."""
    value: dict[str, Any]


def read_entries(path: Path) -> Iterator[Entry]:
    """The file's objects in order; empty lines are passed over. A first `[` makes the file one array.

    Raises:
        OSError: the file cannot be read.
        BadEntry: it is not UTF-8, an entry is no JSON object, or one is longer than 16 Mi characters.
    """
    with path.open(encoding="utf-8-sig") as file:
        line = 1
        try:
            if file.read(CHUNK_CHARACTERS).lstrip().startswith("["):
                file.seek(0)
                yield from _array_entries(file, path)
                return
            file.seek(0)
            while text := file.readline(MAX_ENTRY_CHARACTERS + 1):
                if len(text) > MAX_ENTRY_CHARACTERS:
                    raise BadEntry(path, line, f"is longer than {MAX_ENTRY_CHARACTERS:,} characters")
                if text.strip():
                    yield Entry(line, _line_object(text, path, line))
                line += 1
        except UnicodeDecodeError as error:
            raise BadEntry(path, line, f"is not UTF-8, here or further on: {error.reason}") from None


def _line_object(text: str, path: Path, line: int) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise BadEntry(path, line, str(error)) from None


def _array_entries(file: TextIO, path: Path) -> Iterator[Entry]:
    """The objects between the file's `[` and `]`."""
    window = _Window(file, path)
    window.next_character()
    window.pass_over(1)
    more = window.next_character() != "]"
    while more:
        yield window.take_object()
        mark = window.next_character()
        if mark not in (",", "]"):
            raise BadEntry(path, window.line, f"must go on with , or ] after an entry; it has {mark or 'no more'!r}")
        more = mark == ","
        if more:
            window.pass_over(1)
    window.pass_over(1)
    if window.next_character():
        raise BadEntry(path, window.line, "has more after its array")


class _Window:
    """A stretch of the file: what is read and not yet used. It grows where an object needs it."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.line = 1
        """Of the next character."""
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def next_character(self) -> str:
        """The next one that is not blank, without using it up; empty at the end."""
        while True:
            match = _BLANK.match(self._text, self._at)
            assert match is not None
            self.pass_over(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def pass_over(self, characters: int) -> None:
        """Use them up."""
        self.line += self._text.count("\n", self._at, self._at + characters)
        self._at += characters

    def take_object(self) -> Entry:
        """The object that begins at the next character."""
        if (character := self.next_character()) != "{":
            raise BadEntry(self._path, self.line, f"must be an object; it begins with {character!r}")
        entry_line = self.line
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                if held > MAX_ENTRY_CHARACTERS:
                    problem = f"has no end within {MAX_ENTRY_CHARACTERS:,} characters: {error.msg}"
                    raise BadEntry(self._path, entry_line, problem) from None
                wrong_line = self.line + self._text.count("\n", self._at, error.pos)
                if not self._read_on():
                    raise BadEntry(self._path, wrong_line, error.msg) from None
            except (_Constant, RecursionError) as error:
                raise BadEntry(self._path, entry_line, str(error)) from None
            else:
                self.pass_over(end - self._at)
                return Entry(entry_line, value)

    def _read_on(self) -> bool:
        """Twice what is held, so that a long object is tried a few times only."""
        held = self._text[self._at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(held)))
        self._text, self._at = held + more, 0
        return bool(more)


_BLANK = re.compile(r"\s*")


class _Constant(Exception):  # noqa: N818  (raised by the decoder's hook)
    """Python's decoder reads NaN and Infinity, which JSON does not have."""


def _no_constant(name: str) -> NoReturn:
    raise _Constant(f"holds {name}, which is no JSON")
