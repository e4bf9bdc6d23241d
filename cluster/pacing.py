"""How much at a time: decode rows and prefill tokens of a microbatch.

What leaves stages idle is unequal cost from one microbatch to the next, so work is spread over the microbatches that
make a round: of decode rows as many as there are groups, of prefill as many as there are stages.
"""

from __future__ import annotations

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
