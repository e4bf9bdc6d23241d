"""Who waits, who runs and how far they are: every sequence stands in the queues of its phase, and holds its blocks.

Age is the order of arrival. The running are always older than the waiting, so "youngest" and "last admitted" are one.
"""

from __future__ import annotations

from collections import OrderedDict

from tramontane.cluster.blocks import BlockAllocator
from tramontane.cluster.sequence import Phase, Sequence
from tramontane.stages.kv_layout import KVLayout


class Roster:
    """The sequences of one pipeline. What moves one from phase to phase stands here, when and why in the scheduler."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self.blocks = BlockAllocator(layout)
        self.sequences: dict[int, Sequence] = {}
        """All that have not ended, by id."""
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        """By age."""
        self.running: dict[int, Sequence] = {}
        """PREFILL and DECODE, by age."""
        self.prefilling: dict[int, Sequence] = {}
        """Running, with known tokens left to send, by age."""
        self.decoding: set[int] = set()
        """Running, past the prefill."""
        self.ready: dict[int, Sequence] = {}
        """Decoding, with nothing in flight; longest waiting first."""
        self.outstanding_tokens = 0
        """Known tokens not yet sent, and tokens that may still be generated, over all."""
        self._taken_back = 0

    @property
    def newcomers(self) -> int:
        """The waiting that were never admitted."""
        return len(self.waiting) - self._taken_back

    def enter(self, sequence: Sequence) -> None:
        """A new sequence waits, behind all others."""
        self.sequences[sequence.id] = self.waiting[sequence.id] = sequence
        self.outstanding_tokens += sequence.uncomputed + sequence.remaining

    def admit(self, sequence: Sequence) -> None:
        """The head of the queue starts its prefill."""
        del self.waiting[sequence.id]
        self._taken_back -= sequence.incarnation > 0
        sequence.phase = Phase.PREFILL
        sequence.rings = self.blocks.new_rings()
        self.running[sequence.id] = self.prefilling[sequence.id] = sequence

    def advance(self, sequence: Sequence, length: int) -> None:
        """Its next tokens go down the pipe."""
        sequence.computed += length
        if sequence.scored < sequence.scorable:
            sequence.scored = max(sequence.scored, min(sequence.computed, sequence.scorable))
        self.outstanding_tokens -= length
        if not sequence.uncomputed:
            self.prefilling.pop(sequence.id, None)
            self.ready.pop(sequence.id, None)

    def append(self, sequence: Sequence, token: int) -> None:
        """A generated token is known, and ready to be sent."""
        sequence.tokens.append(token)  # one more to send, one fewer to generate: outstanding_tokens stays
        sequence.phase = Phase.DECODE
        self.decoding.add(sequence.id)
        self.ready[sequence.id] = sequence

    def take_back(self, sequence: Sequence) -> None:
        """A running sequence waits again, before all others, to be computed again from its tokens."""
        self._leave(sequence)
        self.outstanding_tokens += sequence.computed
        sequence.phase = Phase.WAITING
        sequence.computed = 0
        sequence.scored = len(sequence.scores)
        self.waiting[sequence.id] = sequence
        self.waiting.move_to_end(sequence.id, last=False)
        self._taken_back += 1

    def end(self, sequence: Sequence) -> None:
        """It is gone, wherever it stood."""
        if sequence.phase is Phase.WAITING:
            del self.waiting[sequence.id]
            self._taken_back -= sequence.incarnation > 0
        else:
            self._leave(sequence)
        self.outstanding_tokens -= sequence.uncomputed + sequence.remaining
        sequence.phase = Phase.ENDED
        del self.sequences[sequence.id]

    def restart(self) -> None:
        """All the running wait again, by age, and all blocks are as if never taken."""
        for sequence in reversed(list(self.running.values())):
            self.take_back(sequence)
        self.blocks = BlockAllocator(self._layout)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running: its blocks are free at once, and what is in flight for it will be dropped."""
        del self.running[sequence.id]
        self.prefilling.pop(sequence.id, None)
        self.decoding.discard(sequence.id)
        self.ready.pop(sequence.id, None)
        sequence.incarnation += 1
        assert sequence.rings is not None
        self.blocks.release(sequence.rings)
        sequence.rings = None
