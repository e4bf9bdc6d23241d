"""Decides how much context is served and how much memory keys and values get, from what is asked for and what fits.

    neither is asked for   the model's context, lowered to what fits; 512 MiB a stage, or one full context, or what fits
    --max-context          refused if one sequence of it does not fit
    --kv-memory            refused if it does not fit, or does not hold one full context

Pure: memory is given as numbers. Where none is given, everything fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tramontane.cluster.memory_sums import MemorySum, Room, worst_sum
from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import BLOCK, KVLayout, kv_bytes, least_kv_bytes, plan_kv
from tramontane.stages.stage_memory import StageMemory

DEFAULT_BYTES = 512 * 2**20
"""Of keys and values in a stage."""
LARGEST_DEFAULT_CHUNK = 512
OTHER_WAYS = "fewer bytes are needed with --dtype bfloat16, --quantize int8, or --stages over more nodes"


@dataclass(frozen=True, kw_only=True)
class KVOptions:
    """The user's options on context and KV; None is unset."""

    max_context: int | None = None
    kv_memory: int | None = None
    kv_length: int | None = None
    chunk: int | None = None
    max_batch_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """The context and the KV pools that are served."""

    context: int
    layout: KVLayout
    lowered: str
    """Why the context is less than the model's, as a clause. Empty where it is not, or the user asked for less."""
    sum: MemorySum | None
    """The sum of the place that is fullest; None where no place's memory is known."""


class KVPlanner:
    """Plans the KV of one pipeline."""

    def __init__(
        self,
        config: ModelConfig,
        spans: Sequence[range],
        dtype: str,
        options: KVOptions,
        stages: Sequence[StageMemory] = (),
        rooms: Sequence[Room] = (),
    ) -> None:
        """`spans` are the stages' layers. `stages` has an entry for each, unless `rooms` is empty."""
        self._config = config
        self._spans = spans
        self._dtype = dtype
        self._options = options
        self._stages = stages
        self._rooms = rooms

    def plan(self) -> KVPlan:
        """Decide.

        Raises:
            ValueError: an option contradicts the model or another option or does not fit, or not even the model fits.
                The message has the sum and the options that change it.
        """
        context = self._options.max_context or self._config.context
        if context > self._config.context:
            raise ValueError(f"max-context is {context}; the checkpoint's context is {self._config.context}")
        self._chunk(context)  # refuses a chunk that contradicts, before anything is said of memory
        if self._options.kv_memory is not None:
            return self._with_memory(context, self._options.kv_memory)
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
        if self._options.max_context is not None:
            raise ValueError(
                f"--max-context is {context}, and one sequence of so many tokens does not fit: {lacking}. "
                f"--max-context {fitting} fits; {OTHER_WAYS}"
            )
        return self._plan(fitting, self._memory(fitting), lowered=f"{context:,} do not fit: {lacking}")

    def _with_memory(self, context: int, memory: int) -> KVPlan:
        """The plan with the user's KV memory, which has to fit and to hold one full context."""
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
        """The longest context, up to this one, of which `memory` bytes a stage hold one sequence."""
        if self._least(context) <= memory:
            return context
        return self._longest(context, lambda shorter: self._least(shorter) <= memory)

    @property
    def _shortest(self) -> int:
        """The shortest context that is tried: one chunk of the user's, in whole blocks."""
        return -(-(self._options.chunk or 1) // BLOCK) * BLOCK

    def _longest(self, context: int, holds: Callable[[int], bool]) -> int | None:
        """The longest context, up to this one and in whole blocks, for which `holds` is true."""
        blocks = _largest(self._shortest // BLOCK, context // BLOCK, lambda count: holds(count * BLOCK))
        return None if blocks is None else blocks * BLOCK

    def _memory(self, context: int) -> int:
        """The KV memory of a stage by default, for a context of which one sequence fits."""
        least = self._least(context)
        fitting = _largest(least, max(least, DEFAULT_BYTES), lambda size: self._fits(context, size))
        assert fitting is not None, f"one sequence of {context} tokens does not fit"
        return fitting

    def _plan(self, context: int, memory: int, *, lowered: str = "") -> KVPlan:
        layout = self._layout(context, memory)
        return KVPlan(context=context, layout=layout, lowered=lowered, sum=self._sum(context, memory))

    def _fits(self, context: int, memory: int) -> bool:
        worst = self._sum(context, memory)
        return worst is None or worst.over <= 0

    def _sum(self, context: int, memory: int) -> MemorySum | None:
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
            kv_length=self._options.kv_length,
        )

    def _least(self, context: int) -> int:
        return least_kv_bytes(self._config, self._spans, chunk=self._chunk(context), context=context, dtype=self._dtype)

    def _chunk(self, context: int) -> int:
        options = self._options
        most = min(context, options.max_batch_tokens)
        chunk = options.chunk or min(self._config.smallest_window or context, LARGEST_DEFAULT_CHUNK, most)
        if chunk > most:
            raise ValueError(
                f"chunk is {chunk}; the context is {context}, and max-batch-tokens {options.max_batch_tokens}"
            )
        return chunk


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds` is true, as for all smaller ones; None where none is.

    >>> _largest(3, 100, lambda number: number * number < 70)
    8
    """
    past = bisect_left(range(low, high + 1), True, key=lambda number: not holds(number))
    return low + past - 1 if past else None
