"""Clients that do not behave: a share of a plan's requests is turned into cancels, slow readers, connections that come
and go, and requests that must be refused.

Which ones is drawn from the seed by their numbers, so that a level of a sweep has the same ones as the next. Of
{"cancel": 0.1, "bad": 0.05} a request that draws 0.07 cancels, one that draws 0.12 is bad, one that draws 0.5 behaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from tramontane.client.loadtest.load.streams import Stream, generator
from tramontane.client.loadtest.plan import Ask, Conduct

KINDS = (Conduct.CANCEL, Conduct.SLOW, Conduct.CHURN, Conduct.BAD)
"""In the order in which shares are laid out."""
MOST_TOKENS = 2**31 - 1
"""Beyond any context, and still a number that fits every server's field."""


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises ValueError for a kind that there is not, and for shares that are none or add up to more than 1."""
    for kind, share in shares.items():
        if kind not in KINDS:
            raise ValueError(f"misbehave holds {kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0 <= share <= 1:
            raise ValueError(f"misbehave's share of {kind} is {share:g}; it must lie in 0 .. 1")
    if (total := sum(shares.values())) > 1 + 1e-9:
        raise ValueError(f"misbehave's shares add up to {total:g}; their sum must be at most 1")


def misbehave(
    asks: Sequence[Ask],
    shares: Mapping[str, float],
    seed: int,
    *,
    pause_s: float,
    vocabulary: int | None,
    context: int | None,
) -> tuple[Ask, ...]:
    """The same requests, some of them with another conduct.

    A cancel leaves after 0 .. max_tokens - 1 tokens, each as likely: in the queue, in the prefill or amid decoding.
    """
    check_shares(shares)
    ends = list(accumulate(shares.get(kind, 0.0) for kind in KINDS))
    kinds = np.searchsorted(ends, generator(seed, Stream.CONDUCT).random(len(asks)), side="right").tolist()
    cancels = generator(seed, Stream.CANCEL).random(len(asks)).tolist()
    faults = bad_kinds(vocabulary, context)
    bad = 0
    changed = []
    for ask, kind, cancel in zip(asks, kinds, cancels, strict=True):
        conduct = KINDS[kind] if kind < len(KINDS) else Conduct.NORMAL
        if conduct is Conduct.BAD:
            changed.append(replace(faults[bad % len(faults)](ask), conduct=conduct))
            bad += 1
        elif conduct is Conduct.CANCEL:
            changed.append(replace(ask, conduct=conduct, cancel_after=int(cancel * ask.max_tokens)))
        elif conduct is Conduct.SLOW:
            changed.append(replace(ask, conduct=conduct, pause_s=pause_s))
        else:
            changed.append(replace(ask, conduct=conduct))
    return tuple(changed)


def bad_kinds(vocabulary: int | None, context: int | None) -> tuple[Callable[[Ask], Ask], ...]:
    """Ways to be refused, taken in turn. Each changes one field to what no server may take.

    Where the vocabulary is unknown, as of a server that speaks HTTP, prompts stay as they are: such a server wraps an
    empty one into its chat template, and may read ids as it likes.
    """
    too_many = MOST_TOKENS if context is None else context  # and the prompt has at least one
    kinds: list[Callable[[Ask], Ask]] = [
        lambda ask: replace(ask, max_tokens=too_many),
        lambda ask: replace(ask, temperature=-1.0),
        lambda ask: replace(ask, temperature=1.0, top_p=2.0),
    ]
    if vocabulary is not None:
        kinds.append(lambda ask: replace(ask, prompt=(vocabulary,)))
        kinds.append(lambda ask: replace(ask, prompt="" if isinstance(ask.prompt, str) else ()))
    return tuple(kinds)
