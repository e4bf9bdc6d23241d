"""How much at a time: decode rows and prefill tokens of a microbatch, and KV blocks kept back for what is yet to come.

What leaves stages idle is unequal cost from one microbatch to the next, so work is spread over the microbatches that
make a round: of decode rows as many as there are groups, of prefill as many as there are stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tramontane.cluster.blocks import BlockAllocator
from tramontane.cluster.sequence import Sequence

WORTH_A_PASS = 64
"""Prefill tokens below which splitting further does not pay: each pass reads all weights again."""


class Pace:
    """Even shares of the decode rows and of the waiting prompt tokens.

    >>> pace = Pace(stages=4, groups=4)
    >>> [pace.decode_rows(10) for _ in range(8)]
    [2, 3, 2, 3, 2, 3, 2, 3]
    >>> pace.set_prefill(900, decoding=False), pace.prefill_tokens
    (None, 225)
    >>> pace.set_prefill(900, decoding=True), pace.prefill_tokens
    (None, 113)
    >>> pace.set_prefill(130, decoding=True), pace.prefill_tokens
    (None, 65)
    """

    def __init__(self, stages: int, groups: int) -> None:
        self._stages = stages
        self._groups = groups
        self._remainder = 0
        self.prefill_tokens = 0

    def decode_rows(self, decoding: int) -> int:
        """The next microbatch's share of so many decoding sequences; the remainder rotates over the groups.

        With a constant number, groups of any sizes are even after two rounds: a group that came out too large leaves
        rows behind, which the too small ones after it take along.
        """
        rows, self._remainder = divmod(decoding + self._remainder, self._groups)
        return max(rows, 1)

    def set_prefill(self, waiting_tokens: int, *, decoding: bool) -> None:
        """Called when prompts are admitted, and kept until then: a share of what is left would shrink for ever.

        A prefill that has the pipe for itself fills one round. Beside decode it is spread over two, so that no
        microbatch takes much longer than the others (token throttling: gLLM, arXiv 2504.14775). Only admitted
        prompts count, and admission follows the free KV.
        """
        rounds = 2 if decoding else 1
        passes = max(1, min(rounds * self._stages, waiting_tokens // WORTH_A_PASS))
        self.prefill_tokens = -(-waiting_tokens // passes)


class OutputReserve:
    """Keeps blocks back for the running: all that their known tokens need, and a share of their possible output.

    The share rises after each preemption and decays with each microbatch. A full ring needs nothing more.
    """

    START, LEAST, DECAY = 0.5, 0.1, 0.998

    def __init__(self) -> None:
        self.share = self.START

    def rise(self) -> None:
        """Half of the way to reserving everything."""
        self.share += (1.0 - self.share) / 2

    def decay(self) -> None:
        """From everything to half in some 350 microbatches."""
        self.share = max(self.LEAST, self.share * self.DECAY)

    def affordable(
        self, blocks: BlockAllocator, waiting: Iterable[Sequence], running: Iterable[Sequence], seats: int
    ) -> list[Sequence]:
        """Those at the head of the queue that fit beside the running; nobody overtakes. At most `seats`."""
        chosen: list[Sequence] = []
        spare: list[int] | None = None
        for sequence in islice(waiting, max(seats, 0)):
            if not _covers(blocks.free, blocks.needed(len(sequence.tokens))):
                break
            if spare is None:  # not before someone may fit: it looks at all the running
                spare = self._spare(blocks, running)
            needed = self._needed(blocks, sequence)
            if not _covers(spare, needed):
                break
            spare = [left - need for left, need in zip(spare, needed, strict=True)]
            chosen.append(sequence)
        return chosen

    def _spare(self, blocks: BlockAllocator, running: Iterable[Sequence]) -> list[int]:
        """Free blocks less those that the running are expected to take."""
        spare = [*blocks.free]
        for sequence in running:
            assert sequence.rings is not None
            for index, (need, held) in enumerate(
                zip(self._needed(blocks, sequence), sequence.rings.blocks, strict=True)
            ):
                spare[index] -= need - len(held)
        return spare

    def _needed(self, blocks: BlockAllocator, sequence: Sequence) -> list[int]:
        return blocks.needed(len(sequence.tokens) + int(self.share * sequence.remaining))


def _covers(blocks: Iterable[int], needed: Iterable[int]) -> bool:
    return all(need <= count for need, count in zip(needed, blocks, strict=True))
