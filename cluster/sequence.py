"""One request's state at the router: its tokens, how far they are computed, and the blocks it holds."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import InitVar, dataclass, field
from enum import Enum, auto

import numpy as np

from tramontane.cluster.blocks import Rings
from tramontane.cluster.messages import Sampling, Stopping, Submit
from tramontane.stages.microbatch import Int32Array


class Phase(Enum):
    """Where a sequence stands. A preempted one is WAITING again."""

    WAITING = auto()
    PREFILL = auto()
    """Admitted; its known tokens go down the pipe in chunks, and the last one samples."""
    DECODE = auto()
    """One token at a time: in flight, or ready for the next."""
    ENDED = auto()


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A validated request and what has become of it.

    Prompt of 5, 2 tokens generated, the second one ready to be sent: `len(tokens) == 7`, `computed == 6`.
    """

    id: int
    prompt: InitVar[Items[int] | Int32Array]
    stopping: Stopping
    sampling: Sampling = field(default_factory=Sampling)
    score_prompt: bool = False
    """Whether each prompt row is scored against the prompt's next token."""
    arrived_s: float = 0.0
    """By the caller's clock, as the next one."""
    deadline_s: float | None = None
    """It has to have ended by then."""
    estimated_wait_s: float | None = None
    """What its wait was taken to be when it came; None where no estimate was made."""

    tokens: array[int] = field(init=False)
    """The prompt and all that was generated."""
    prompt_tokens: int = field(init=False)
    scores: list[float] = field(init=False, default_factory=list)
    """Log probability of each prompt token after the first, in order, as far as they are back."""
    scored: int = field(init=False, default=0)
    """Prompt rows sent to be scored; those beyond `len(scores)` are in flight."""
    phase: Phase = field(init=False, default=Phase.WAITING)
    computed: int = field(init=False, default=0)
    """Tokens sent down the pipe since its last admission."""
    incarnation: int = field(init=False, default=0)
    """Counts the times that it stopped running: results for an older incarnation are dropped."""
    rings: Rings | None = field(init=False, default=None)
    """Its blocks while it runs."""

    def __post_init__(self, prompt: Items[int] | Int32Array) -> None:
        self.tokens = array("i", np.asarray(prompt, np.int32).tobytes())
        self.prompt_tokens = len(self.tokens)

    @classmethod
    def from_submit(cls, sequence_id: int, submit: Submit, now: float) -> Sequence:
        """The sequence that a gateway's message asks for, which came at `now`."""
        return cls(
            id=sequence_id,
            prompt=submit.tokens,
            stopping=submit.stopping,
            sampling=submit.sampling,
            arrived_s=now,
            deadline_s=None if submit.remaining_ms is None else now + submit.remaining_ms / 1e3,
        )

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def completion(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_tokens :].tolist()

    @property
    def uncomputed(self) -> int:
        """Known tokens not yet sent down the pipe."""
        return len(self.tokens) - self.computed

    @property
    def remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.stopping.max_tokens - self.generated

    @property
    def scorable(self) -> int:
        """Prompt rows that have a next token to be scored against."""
        return self.prompt_tokens - 1 if self.score_prompt else 0

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that must not be sampled next."""
        return self.stopping.token_ids if self.generated < self.stopping.min_tokens else ()
