"""The whole contract between the router and the stages: a `Microbatch` goes in, a `StepResult` comes out.

Letters: T rows (tokens) of the microbatch, S pieces (a piece is what one sequence contributes), M sampled rows,
K scored rows, F blocks newly taken.

The router owns all state of sequences. Stages keep only the rows of keys and values, and obey: a microbatch says for
every token where its key goes, and which blocks to clear before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Int64Array: TypeAlias = NDArray[np.int64]
UInt64Array: TypeAlias = NDArray[np.uint64]
Float32Array: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockTable:
    """The rings of one window class, ragged: `held[s]` blocks of piece s, in the order of their ring places.

    Two pieces that hold 2 and 1 blocks: `blocks = [7, 3, 5]`, `held = [2, 1]`; piece 0's logical block b lies in block
    `[7, 3][b % ring]`, where ring is the class's constant (`KVLayout.rings`).
    """

    blocks: Int32Array
    """Block ids, concatenated over the pieces. [sum(held)]"""
    held: Int32Array
    """Blocks of each piece's ring taken so far, this microbatch's included. [S]"""
    fresh: Int32Array
    """Blocks taken since the microbatch before, by whichever sequence; every stage fills them with zeros. [F]"""


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledRows:
    """The rows whose next token the last stage chooses, and how. Unset options have their neutral value here."""

    row: Int32Array
    """Index on the token axis. [M]"""
    temperature: Float32Array
    """0 is greedy. [M]"""
    top_k: Int32Array
    """0 is off. [M]"""
    top_p: Float32Array
    """1 is off. [M]"""
    min_p: Float32Array
    """0 is off. [M]"""
    seed: UInt64Array
    """With the sampled token's position, all that the noise depends on. [M]"""
    banned: Int32Array
    """Token ids that must not be sampled (EOS and stop ids before min_tokens), concatenated. [sum(banned_count)]"""
    banned_count: Int32Array
    """How many of them belong to each row. [M]"""

    def banning(self, ids: Int32Array) -> SampledRows:
        """The same rows, with these ids banned in each of them, too."""
        if not len(ids):
            return self
        ends = np.repeat(np.cumsum(self.banned_count), len(ids))
        banned = np.insert(self.banned, ends, np.tile(ids, len(self.row)))
        return replace(self, banned=banned, banned_count=self.banned_count + np.int32(len(ids)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredRows:
    """The rows whose log probability of a given next token is wanted."""

    row: Int32Array
    """Index on the token axis. [K]"""
    target: Int32Array
    """Token id. [K]"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Microbatch:
    """One pass through the pipeline: decode tokens and prefill chunks of many sequences on one token axis.

    Sequence 4 continues its prompt with a chunk of 3 tokens at position 8, sequence 9 decodes one token at 20:

        tokens   = [11, 12, 13, 14]     first  = [8, 20]     length   = [3, 1]
        position = [ 8,  9, 10, 20]     piece  = [0, 0, 0, 1]    sampled.row = [3]
    """

    epoch: int
    """The router's binding; stages drop microbatches of any other."""
    step: int
    """Counts up from 0 within the epoch, without gaps: ring writes are not idempotent."""
    tokens: Int32Array
    """Packed token ids. [T]"""
    first: Int32Array
    """Position of each piece's first token. [S]"""
    length: Int32Array
    """Tokens of each piece, at least 1. [S]"""
    sequence: Int64Array
    """Ids of the sequences, for messages only. [S]"""
    tables: tuple[BlockTable, ...]
    """One a window class, in the model's order."""
    sampled: SampledRows
    scored: ScoredRows

    @cached_property
    def start(self) -> Int32Array:
        """Index of each piece's first row on the token axis. [S]"""
        return (np.cumsum(self.length, dtype=np.int32) - self.length).astype(np.int32)

    @cached_property
    def piece(self) -> Int32Array:
        """The piece that each row belongs to. [T]"""
        return np.repeat(np.arange(len(self.length), dtype=np.int32), self.length)

    @cached_property
    def position(self) -> Int32Array:
        """The position of each row in its sequence. [T]"""
        if len(self.tokens) == len(self.first):  # one row a piece, as in decode
            return self.first
        rows = np.arange(len(self.tokens), dtype=np.int32)
        return rows + np.repeat(self.first - self.start, self.length)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepResult:
    """What the last stage sends back to the router."""

    epoch: int
    step: int
    token: Int32Array
    """The id chosen for each sampled row. [M]"""
    log_probability: Float32Array
    """Its natural log probability under the model's own softmax, before temperature and filters. [M]"""
    finite: BoolArray
    """False where the row's logits held NaN or infinity, or every id was banned: its token means nothing, and its
    request must fail. [M]"""
    score: Float32Array
    """Natural log probability of each scored row's target. [K]"""


def no_sampled_rows() -> SampledRows:
    """A microbatch that samples nothing."""
    none_i, none_f = np.empty(0, np.int32), np.empty(0, np.float32)
    return SampledRows(
        row=none_i,
        temperature=none_f,
        top_k=none_i,
        top_p=none_f,
        min_p=none_f,
        seed=np.empty(0, np.uint64),
        banned=none_i,
        banned_count=none_i,
    )


def no_scored_rows() -> ScoredRows:
    """A microbatch that scores nothing."""
    return ScoredRows(row=np.empty(0, np.int32), target=np.empty(0, np.int32))
