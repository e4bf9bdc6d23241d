"""What is asked of every contestant: four loads that are bound by different things, and how each is counted.

A   32 requests at once, prompts of 32 to 512 tokens, 64 new tokens each: prefill beside decode, then decode of many
    rows. Counted: generated tokens over the whole time.
B   one request, 128 + 128: each step reads the weights that one row touches. Counted: tokens after the first over the
    time after the first.
C   one prompt of 4,096 tokens: all arithmetic. Counted: prompt tokens over the time to the first token.
D   8 requests, 128 + 64: a few rows touch nearly all experts, and share nothing of them. Counted as A.

All is greedy and goes on through the end-of-sequence token, so that every contestant computes as many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Counted = Literal["whole", "decode", "prefill"]
SEED = 7


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    """Of each request."""
    counted: Counted

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the prompts."""
        return tuple(len(prompt) for prompt in self.prompts)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence at its end."""
        return max(self.lengths) + self.new_tokens

    @property
    def counted_tokens(self) -> int:
        """Those that the figure is about.

        >>> Workload("B", ((5, 6, 7),), 4, "decode").counted_tokens
        3
        """
        if self.counted == "prefill":
            return sum(self.lengths)
        every = len(self.prompts) * self.new_tokens
        return every - len(self.prompts) if self.counted == "decode" else every

    def tokens_per_s(self, wall_s: float, first_s: float) -> float:
        """The figure of a run that took so long, and had its last first token after `first_s`.

        >>> Workload("B", ((5, 6, 7),), 4, "decode").tokens_per_s(wall_s=2.5, first_s=1.0)
        2.0
        """
        seconds = {"whole": wall_s, "decode": wall_s - first_s, "prefill": first_s}[self.counted]
        return self.counted_tokens / seconds

    def as_json(self) -> dict[str, object]:
        """As a job carries it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Workload:
        """What `as_json` made."""
        return cls(**(dict(values) | {"prompts": tuple(map(tuple, values["prompts"]))}))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each; the defaults are the bench's."""

    many: int = 32
    shortest: int = 32
    longest: int = 512
    many_new: int = 64
    one: int = 128
    one_new: int = 128
    long: int = 4096
    few: int = 8
    few_prompt: int = 128
    few_new: int = 64


FULL = Sizes()
QUICK = Sizes(
    many=8, shortest=8, longest=64, many_new=16, one=32, one_new=32, long=512, few=4, few_prompt=32, few_new=16
)


def make_warm_up(vocab: int) -> Workload:
    """What every contestant runs first, untimed: enough to load code, start threads and touch the weights."""
    prompts = np.random.default_rng(SEED + 1).integers(3, vocab, (4, 64)).tolist()
    return Workload("warm-up", tuple(map(tuple, prompts)), 4, "whole")


def make_workloads(vocab: int, sizes: Sizes = FULL) -> dict[str, Workload]:
    """The four, by name. The same vocabulary and sizes give the same ids; none is below 3 (control tokens)."""
    draw = np.random.default_rng(SEED)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, vocab, length).tolist())

    lengths = draw.integers(sizes.shortest, sizes.longest + 1, sizes.many).tolist()
    few = [sizes.few_prompt] * sizes.few
    workloads = (
        Workload("A", tuple(prompt(length) for length in lengths), sizes.many_new, "whole"),
        Workload("B", (prompt(sizes.one),), sizes.one_new, "decode"),
        Workload("C", (prompt(sizes.long),), 1, "prefill"),
        Workload("D", tuple(prompt(length) for length in few), sizes.few_new, "whole"),
    )
    return {workload.name: workload for workload in workloads}
