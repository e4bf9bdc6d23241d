"""A model's vocabulary: which ids exist, what bytes each prints, which are control tokens, which end a completion.

The tokenizer gives its own ids; the folder's other files (`named_ids.py`) give those that were added after them. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tramontane.cluster.named_ids import NamedIds
from tramontane.stages.folder import SmallFiles, shown

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece, and `tokenizer.json` after it."""
SHOWN = 3
"""How many ids a line names; it counts the others."""


class Pieces(Protocol):
    """The tokenizer's own ids, 0 .. len(surfaces) - 1, as `Vocabulary` takes them from it."""

    surfaces: tuple[bytes, ...]
    """The bytes that each id prints within a text, UTF-8 or a part of a character. Control tokens print nothing."""
    control: frozenset[int]
    spaced: frozenset[int]
    """Ids whose bytes begin with a space that encoding may have put before a text."""
    drops_first_space: bool
    """Encoding puts a space before the text, so decoding takes one from its beginning."""
    drops_leading_spaces: bool
    """Decoding takes all of them from its beginning."""
    eos_id: int | None

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, as the tokenizer writes it; None where it has no such piece."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What each id of a model is. Nothing else decides that."""

    rows: int
    """The rows of embedding and head. Every id is below this, whether a file names it or not."""
    named: frozenset[int] | None
    """Ids that a file names; only these are sampled. None means all rows: no file lists ids."""
    surfaces: tuple[bytes, ...] = ()
    """The bytes that each id prints, as in `Pieces`. Ids beyond print nothing; without a tokenizer there are none."""
    control: frozenset[int] = frozenset()
    """Ids that print nothing because they are no text: beginning, end, roles of a chat."""
    spaced: frozenset[int] = frozenset()
    drops_first_space: bool = False
    drops_leading_spaces: bool = False
    eos_ids: tuple[int, ...] = ()
    """Ids that end a completion."""
    remarks: tuple[str, ...] = ()
    """What the files name and the model lacks, a line each."""

    @classmethod
    def read(cls, files: SmallFiles, rows: int, pieces: Pieces | None) -> Vocabulary:
        """The vocabulary of a checkpoint folder; see `of`."""
        return cls.of(rows, pieces, NamedIds.read(files))

    @classmethod
    def of(cls, rows: int, pieces: Pieces | None, files: NamedIds) -> Vocabulary:
        """The vocabulary of a model with so many rows.

        The EOS ids are those of `generation_config.json`, else of `config.json`, else of the tokenizer. The token that
        `tokenizer_config.json` calls EOS counts in any case.

        Raises:
            ValueError: all EOS ids that the files name lie beyond the rows.
        """
        own = range(len(pieces.surfaces)) if pieces is not None else range(0)
        # A tokenizer.json may have more pieces than the tokenizer, too.
        others = {token_id: text.replace(SPACE, " ") for text, token_id in files.pieces.items() if token_id not in own}
        texts = {token_id: text for token_id, text in (others | files.texts).items() if token_id < rows}
        # config.json may name any piece as padding, so its roles make added ids special only.
        special = files.special | {token_id for token_id in files.roles if token_id not in own}
        eos_ids, remarks = _eos_ids(rows, pieces, files)
        listed = {*files.pieces.values(), *files.texts}
        beyond = sorted(token_id for token_id in listed if token_id >= rows)
        if beyond:
            texts_of = {token_id: text for text, token_id in files.pieces.items()} | files.texts
            called = [f"{token_id} ({shown(texts_of[token_id])})" for token_id in beyond]
            remarks.append(f"ids beyond the model's {rows} rows are passed over: {_some(called)}")
        within = frozenset(token_id for token_id in {*own, *listed, *files.roles, *eos_ids} if token_id < rows)
        named = within if pieces is not None or files.pieces else None
        if pieces is None:
            return cls(rows=rows, named=named, eos_ids=eos_ids, remarks=tuple(remarks))
        control = frozenset(token_id for token_id in pieces.control | special if token_id < rows)
        surfaces = list(pieces.surfaces) + [b""] * (max(texts, default=-1) + 1 - len(own))
        for token_id, text in texts.items():
            if token_id not in own:
                surfaces[token_id] = text.encode()
        for token_id in control:
            if token_id < len(surfaces):
                surfaces[token_id] = b""
        return cls(
            rows=rows,
            named=named,
            surfaces=tuple(surfaces),
            control=control,
            spaced=pieces.spaced,
            drops_first_space=pieces.drops_first_space,
            drops_leading_spaces=pieces.drops_leading_spaces,
            eos_ids=eos_ids,
            remarks=tuple(remarks),
        )

    @property
    def sampleable_ids(self) -> int:
        """The end of the ids that may be sampled; see `unnamed_ids`."""
        return self.rows if self.named is None else max(self.named, default=-1) + 1

    @cached_property
    def unnamed_ids(self) -> tuple[int, ...]:
        """The ids below `sampleable_ids` that are not sampled, because no file names them."""
        return () if self.named is None else tuple(sorted({*range(self.sampleable_ids)} - self.named))


def _eos_ids(rows: int, pieces: Pieces | None, files: NamedIds) -> tuple[tuple[int, ...], list[str]]:
    """The EOS ids, and a line for each file that names some beyond the rows."""
    chosen: tuple[int, ...] = ()
    beyond: dict[str, list[int]] = {}
    for path, ids in files.eos_ids.items():
        chosen = chosen or tuple(token_id for token_id in ids if token_id < rows)
        if over := [token_id for token_id in ids if token_id >= rows]:
            beyond[path] = over
    if not chosen and pieces is not None and pieces.eos_id is not None:
        chosen = (pieces.eos_id,)
    if files.eos_text is not None:
        own = None if pieces is None else pieces.id_of(files.eos_text)
        called = files.id_of(files.eos_text) if own is None else own
        if called is not None and called < rows:
            chosen = tuple(dict.fromkeys([*chosen, called]))
    said = [f"{path}: eos_token_id {_some(ids)}, beyond the model's {rows} rows" for path, ids in beyond.items()]
    if said and not chosen:
        raise ValueError(f"{said[0]}; no other EOS is named, so that no completion could end by itself")
    return chosen, [f"{line}, is passed over" for line in said]


def _some(ids: Sequence[object]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(map(str, ids[:SHOWN])) + more
