"""From the scheduler's decisions to a `Microbatch`, and from its `StepResult` back to the sequences.

Lists are gathered first, each array is built once.

Letters as in `tramontane.stages.microbatch`: T rows, S pieces, M sampled rows, K scored rows, F fresh blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tramontane.cluster.sequence import Phase, Sequence
from tramontane.cluster.step_cost import StepLoad
from tramontane.stages.microbatch import (
    BlockTable,
    Int32Array,
    Microbatch,
    SampledRows,
    ScoredRows,
    StepResult,
    no_sampled_rows,
    no_scored_rows,
)

NOTHING = range(0)


class Piece(NamedTuple):
    """What one sequence contributes: its tokens first .. first + length. (A tuple: one a row, and cheap to make.)"""

    sequence: Sequence
    first: int
    length: int
    decodes: bool
    """One generated token goes in, and the next one comes out."""
    samples: bool
    """Its last row is sampled: a decode, or the end of a prefill."""
    scored: range
    """Positions of the rows that are scored against the prompt's next token."""

    @classmethod
    def following(cls, sequence: Sequence, length: int) -> Piece:
        """The next `length` tokens of a sequence."""
        first, last = sequence.computed, sequence.computed + length
        scored = NOTHING
        if sequence.scored < sequence.scorable:
            scored = range(max(first, sequence.scored), min(last, sequence.scorable))
        decodes = sequence.phase is Phase.DECODE
        return cls(sequence, first, length, decodes, last == len(sequence.tokens), scored)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A microbatch in the pipe: whom its results belong to, each with the incarnation that they are for."""

    epoch: int
    step: int
    load: StepLoad
    sent_s: float
    """When it left, by the caller's clock."""
    sampled: list[tuple[Sequence, int]]
    scored: list[tuple[Sequence, int, int]]
    """... and how many scores."""

    @classmethod
    def of(cls, epoch: int, step: int, pieces: Items[Piece], load: StepLoad, sent_s: float) -> InFlight:
        """What to remember about a microbatch of these pieces."""
        return cls(
            epoch=epoch,
            step=step,
            load=load,
            sent_s=sent_s,
            sampled=[(piece.sequence, piece.sequence.incarnation) for piece in pieces if piece.samples],
            scored=[(p.sequence, p.sequence.incarnation, len(p.scored)) for p in pieces if p.scored],
        )

    @property
    def decodes(self) -> bool:
        """Whether it carries decode rows."""
        return self.load.decode_rows > 0

    def samples_of(self, result: StepResult) -> Iterator[tuple[Sequence, int, float, bool]]:
        """Sequence, token, log probability and finite, of each sampled row whose incarnation still lives."""
        columns = result.token.tolist(), result.log_probability.tolist(), result.finite.tolist()
        for (sequence, incarnation), token, log_probability, finite in zip(self.sampled, *columns, strict=True):
            if sequence.incarnation == incarnation:
                yield sequence, token, log_probability, finite

    def scores_of(self, result: StepResult) -> Iterator[tuple[Sequence, list[float]]]:
        """The scores of each sequence whose incarnation still lives, in the order of its rows."""
        scores, start = result.score.tolist(), 0
        assert len(scores) == sum(count for _, _, count in self.scored), f"{len(scores)} scores came"
        for sequence, incarnation, count in self.scored:
            if sequence.incarnation == incarnation:
                yield sequence, scores[start : start + count]
            start += count


def pack(epoch: int, step: int, pieces: Items[Piece], fresh: Items[Items[int]]) -> Microbatch:
    """One microbatch of these pieces; `fresh[c]` are the blocks of class c to be zeroed before."""
    tokens = array("i")
    for piece in pieces:
        tokens.extend(piece.sequence.tokens[piece.first : piece.first + piece.length])
    length = np.array([piece.length for piece in pieces], np.int32)
    end = np.cumsum(length, dtype=np.int32)
    return Microbatch(
        epoch=epoch,
        step=step,
        tokens=np.array(tokens, np.int32),
        first=np.array([piece.first for piece in pieces], np.int32),
        length=length,
        sequence=np.array([piece.sequence.id for piece in pieces], np.int64),
        tables=tuple(_table(pieces, index, blocks) for index, blocks in enumerate(fresh)),
        sampled=_sampled(pieces, end),
        scored=_scored(pieces, end - length),
    )


def _table(pieces: Items[Piece], index: int, fresh: Items[int]) -> BlockTable:
    rings = [piece.sequence.rings.blocks[index] for piece in pieces if piece.sequence.rings is not None]
    assert len(rings) == len(pieces), f"{len(pieces) - len(rings)} of {len(pieces)} pieces hold no rings"
    return BlockTable(
        blocks=np.frombuffer(bytearray().join(rings), np.int32),
        held=np.array([len(ring) for ring in rings], np.int32),
        fresh=np.array(fresh, np.int32),
    )


def _sampled(pieces: Iterable[Piece], end_S: Int32Array) -> SampledRows:
    chosen = [(index, piece.sequence) for index, piece in enumerate(pieces) if piece.samples]
    if not chosen:
        return no_sampled_rows()
    sampling = [sequence.sampling for _, sequence in chosen]
    banned = [sequence.banned for _, sequence in chosen]
    return SampledRows(
        row=end_S[[index for index, _ in chosen]] - np.int32(1),
        temperature=np.array([each.temperature for each in sampling], np.float32),
        top_k=np.array([each.top_k for each in sampling], np.int32),
        top_p=np.array([each.top_p for each in sampling], np.float32),
        min_p=np.array([each.min_p for each in sampling], np.float32),
        seed=np.array([each.seed for each in sampling], np.uint64),
        banned=np.array([token for ids in banned for token in ids], np.int32),
        banned_count=np.array([len(ids) for ids in banned], np.int32),
    )


def _scored(pieces: Iterable[Piece], start_S: Int32Array) -> ScoredRows:
    rows: list[Int32Array] = []
    target = array("i")
    for start, piece in zip(start_S.tolist(), pieces, strict=True):
        if piece.scored:
            row = start + piece.scored.start - piece.first
            rows.append(np.arange(row, row + len(piece.scored), dtype=np.int32))
            target.extend(piece.sequence.tokens[piece.scored.start + 1 : piece.scored.stop + 1])
    return ScoredRows(row=np.concatenate(rows), target=np.array(target, np.int32)) if rows else no_scored_rows()
