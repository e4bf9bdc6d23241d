"""How much context is served and how much memory keys and values get: what is asked for, held against what fits.

    neither is asked for   the model's context, lowered to what fits; 512 MiB a stage, or one full context, or what fits
    --max-context          refused if one sequence of it does not fit
    --kv-memory            refused if it does not fit, or does not hold one full context

Pure: the memory of the places is given as numbers. Where none is given, everything fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tramontane.cluster.memory_sums import Room, Sum, worst_sum
from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import BLOCK, KVLayout, kv_bytes, least_kv_bytes, plan_kv
from tramontane.stages.stage_memory import StageMemory

DEFAULT_BYTES = 512 * 2**20
"""Of a stage."""
LARGEST_DEFAULT_CHUNK = 512
OTHER_WAYS = "fewer bytes are needed with --dtype bfloat16, --quantize int8, or --stages over more nodes"


@dataclass(frozen=True, kw_only=True)
class KVWishes:
    """The user's options; None is unset."""

    max_context: int | None = None
    kv_memory: int | None = None
    kv_length: int | None = None
    chunk: int | None = None
    max_batch_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """What is served."""

    context: int
    layout: KVLayout
    lowered: str
    """Why the context is less than the model's, as a clause; empty where the user asked for it, or it is not."""
    sum: Sum | None
    """At the fullest place; None where none is known."""


class KVPlanner:
    """For one pipeline."""

    def __init__(
        self,
        config: ModelConfig,
        spans: Sequence[range],
        dtype: str,
        wishes: KVWishes,
        stages: Sequence[StageMemory] = (),
        rooms: Sequence[Room] = (),
    ) -> None:
        """`stages` has an entry for each of `spans`, the stages' layers, unless there are no rooms."""
        self._config = config
        self._spans = spans
        self._dtype = dtype
        self._wishes = wishes
        self._stages = stages
        self._rooms = rooms

    def plan(self) -> KVPlan:
        """Decide.

        Raises:
            ValueError: an option contradicts the model or another option, or does not fit, or nothing does: with the
                sum and the options that change it.
        """
        context = self._wishes.max_context or self._config.context
        if context > self._config.context:
            raise ValueError(f"max-context is {context}; the checkpoint's context is {self._config.context}")
        self._chunk(context)
        if self._wishes.kv_memory is not None:
            return self._with_memory(context, self._wishes.kv_memory)
        least = self._least(context)
        if self._fits(context, least):
            return self._plan(context, self._memory(context))
        lacking = self._sum(context, least)
        fitting = self._longest(context, lambda shorter: self._fits(shorter, self._least(shorter)))
        if fitting is None:
            shortest = min(self._shortest, context)
            lacking = self._sum(shortest, self._least(shortest))
            raise ValueError(
                f"the model does not fit, even with a context of {shortest} tokens: {lacking}; {OTHER_WAYS}"
            )
        if self._wishes.max_context is not None:
            raise ValueError(
                f"--max-context is {context}, and one sequence of so many tokens does not fit: {lacking}. "
                f"--max-context {fitting} fits; {OTHER_WAYS}"
            )
        return self._plan(fitting, self._memory(fitting), lowered=f"{context:,} do not fit: {lacking}")

    def _with_memory(self, context: int, memory: int) -> KVPlan:
        """The user's own memory, if it fits and holds one full context."""
        asked = f"--kv-memory is {memory} bytes a stage"
        held = self._held(context, memory)
        if held is not None and not self._fits(held, memory):
            lacking, shortest = self._sum(held, memory), min(self._shortest, context)
            fitting = _largest(self._least(shortest), memory, lambda size: self._fits(shortest, size))
            if fitting is None:
                raise ValueError(f"{asked}, and not even the model fits: {lacking}; {OTHER_WAYS}")
            less = self._held(context, fitting)
            also = "" if less == context else f" with --max-context {less}"
            raise ValueError(f"{asked}, and that does not fit: {lacking}. {fitting} bytes fit{also}; {OTHER_WAYS}")
        if held != context:
            way = "raise it" if held is None else f"raise it, or give --max-context {held}, which it holds"
            raise ValueError(f"{asked}; one sequence of {context} tokens needs {self._least(context)} bytes: {way}")
        return self._plan(context, memory)

    def _held(self, context: int, memory: int) -> int | None:
        """The longest context up to this one of which a stage's memory holds one sequence."""
        if self._least(context) <= memory:
            return context
        return self._longest(context, lambda shorter: self._least(shorter) <= memory)

    @property
    def _shortest(self) -> int:
        """The least context that is worth while: a block, and what a chunk of the user's takes."""
        return -(-(self._wishes.chunk or 1) // BLOCK) * BLOCK

    def _longest(self, context: int, holds: Callable[[int], bool]) -> int | None:
        """The longest context up to this one, in whole blocks, for which it holds."""
        blocks = _largest(self._shortest // BLOCK, context // BLOCK, lambda count: holds(count * BLOCK))
        return None if blocks is None else blocks * BLOCK

    def _memory(self, context: int) -> int:
        """A stage's, for a context of which one sequence fits."""
        least = self._least(context)
        fitting = _largest(least, max(least, DEFAULT_BYTES), lambda size: self._fits(context, size))
        assert fitting is not None, f"a context of {context} was to fit"
        return fitting

    def _plan(self, context: int, memory: int, *, lowered: str = "") -> KVPlan:
        layout = self._layout(context, memory)
        return KVPlan(context=context, layout=layout, lowered=lowered, sum=self._sum(context, memory))

    def _fits(self, context: int, memory: int) -> bool:
        worst = self._sum(context, memory)
        return worst is None or worst.over <= 0

    def _sum(self, context: int, memory: int) -> Sum | None:
        kv = kv_bytes(self._config, self._spans, self._layout(context, memory), self._dtype)
        return worst_sum(self._rooms, self._stages, kv)

    def _layout(self, context: int, memory: int) -> KVLayout:
        return plan_kv(
            self._config,
            self._spans,
            kv_memory_bytes=memory,
            chunk=self._chunk(context),
            context=context,
            dtype=self._dtype,
            kv_length=self._wishes.kv_length,
        )

    def _least(self, context: int) -> int:
        return least_kv_bytes(self._config, self._spans, chunk=self._chunk(context), context=context, dtype=self._dtype)

    def _chunk(self, context: int) -> int:
        wishes = self._wishes
        most = min(context, wishes.max_batch_tokens)
        chunk = wishes.chunk or min(self._config.smallest_window or context, LARGEST_DEFAULT_CHUNK, most)
        if chunk > most:
            raise ValueError(
                f"chunk is {chunk}; the context is {context}, and max-batch-tokens {wishes.max_batch_tokens}"
            )
        return chunk


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which it holds; None where there is none. It holds up to there.

    >>> _largest(3, 100, lambda number: number * number < 70)
    8
    """
    past = bisect_left(range(low, high + 1), True, key=lambda number: not holds(number))
    return low + past - 1 if past else None
