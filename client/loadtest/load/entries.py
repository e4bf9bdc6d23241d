"""Reads large files entry by entry: one JSON object a line (jsonl), one array of objects, as ShareGPT's file is, or a
table with commas and a head of names (CSV).

Never more than one entry is held, and an entry has a limit, so that a file of any size, or the wrong file, costs little
memory. What cannot be read is passed over and counted: a line of jsonl or CSV alone, of an array also what comes after
a fault in its syntax, for nobody knows where the next entry begins.

Some files are Python's own dialect of JSON: NaN stands for nothing in them, and is read as null.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tramontane.client.loadtest.load.passed_over import Tally

MAX_ENTRY_CHARACTERS = 16 << 20
CHUNK_CHARACTERS = 1 << 20
MAX_DIGITS = 40
"""Of a number that is read exactly."""


class Entry(NamedTuple):
    """One object of a file."""

    line: int
    """Where it begins, from 1."""
    value: dict[str, Any]
    in_table: bool = False
    """Its values are text."""


def read_entries(path: Path, tally: Tally, is_head: Callable[[list[str]], bool] = lambda _: False) -> Iterator[Entry]:
    """The file's objects in order; empty lines are nothing. A first `[` makes the file one array, and a first line that
    `is_head` knows makes it a table, whose values are text.

    Bytes that are no UTF-8 come as lone surrogates.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        beginning = file.read(CHUNK_CHARACTERS).lstrip()
        file.seek(0)
        if beginning.startswith("["):
            yield from _array_entries(file, tally)
        elif is_head(_cells(beginning.partition("\n")[0])):
            yield from _table_entries(file, tally)
        else:
            yield from _line_entries(file, tally)


def _line_entries(file: TextIO, tally: Tally) -> Iterator[Entry]:
    line = 0
    while text := file.readline(MAX_ENTRY_CHARACTERS + 1):
        line += 1
        if len(text) > MAX_ENTRY_CHARACTERS:
            tally.add(f"it is longer than {MAX_ENTRY_CHARACTERS:,} characters", line)
            while text and not text.endswith("\n"):
                text = file.readline(CHUNK_CHARACTERS)
            continue
        if not text.strip():
            continue
        try:
            value = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            tally.add(f"it is no JSON: {error.msg} at character {error.pos}", line)
        except RecursionError:
            tally.add(_TOO_DEEP, line)
        else:
            if isinstance(value, dict):
                yield Entry(line, value)
            else:
                tally.add(_NO_OBJECT, line)


def _table_entries(file: TextIO, tally: Tally) -> Iterator[Entry]:
    rows = csv.reader(iter(lambda: file.readline(MAX_ENTRY_CHARACTERS), ""))
    head: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            tally.add(f"it is no row of a table: {error}", line)
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if head:
            values = {name: cell.strip() or None for name, cell in zip(head, cells, strict=False)}
            yield Entry(line, values, in_table=True)
        else:
            head = cells


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _array_entries(file: TextIO, tally: Tally) -> Iterator[Entry]:
    """The objects between the file's `[` and `]`."""
    window = _Window(file)
    window.next_character()
    window.pass_over(1)
    more = window.next_character() != "]"
    try:
        while more:
            line, value = window.take_value()
            if isinstance(value, dict):
                yield Entry(line, value)
            else:
                tally.add(_NO_OBJECT, line)
            mark = window.next_character()
            if mark not in (",", "]"):
                raise _Lost(window.line, f"after an entry comes {mark or 'no more'!r}, where , or ] is due")
            more = mark == ","
            window.pass_over(1)
        if window.next_character():
            raise _Lost(window.line, "more comes after the array")
    except _Lost as lost:
        tally.add(f"it cannot be read from there on: {lost.problem}", lost.line)


class _Lost(Exception):  # noqa: N818  (where it is)
    """Where the next entry begins is not known."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line, self.problem = line, problem


class _Window:
    """A stretch of the file: what is read and not yet used. It grows where a value needs it."""

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        """Of the next character."""
        self._file = file
        self._text = ""
        self._at = 0

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

    def take_value(self) -> tuple[int, Any]:
        """The value that begins at the next character, and the line of that.

        Raises:
            _Lost: there is none, or it is too long or too deep.
        """
        self.next_character()
        line = self.line
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                if held > MAX_ENTRY_CHARACTERS:
                    problem = f"an entry has no end within {MAX_ENTRY_CHARACTERS:,} characters: {error.msg}"
                    raise _Lost(line, problem) from None
                wrong_line = self.line + self._text.count("\n", self._at, error.pos)
                if not self._read_on():
                    raise _Lost(wrong_line, error.msg) from None
            except RecursionError:
                raise _Lost(line, _TOO_DEEP) from None
            else:
                if end == len(self._text) and self._read_on():
                    continue  # a number may go on
                self.pass_over(end - self._at)
                return line, value

    def _read_on(self) -> bool:
        """Twice what is held, so that a long value is tried a few times only."""
        held = self._text[self._at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(held)))
        self._text, self._at = held + more, 0
        return bool(more)


def _whole(digits: str) -> int | float:
    """Python refuses to read thousands of digits as a whole number."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_int=_whole)
_BLANK = re.compile(r"\s*")
_NO_OBJECT = "it is no JSON object"
_TOO_DEEP = "it is nested too deep"
