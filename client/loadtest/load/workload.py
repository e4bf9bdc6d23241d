"""What users send, as options say it. `asks.py` makes requests of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tramontane.client.loadtest.load.corpus import RandomIds, SyntheticText, TextFile
from tramontane.client.loadtest.load.fitting import DEFAULT_LENGTH
from tramontane.client.loadtest.load.lengths import Lengths
from tramontane.client.loadtest.load.misbehaviour import check_shares
from tramontane.client.loadtest.load.prompt_file import PromptFile
from tramontane.client.loadtest.texts import unsendable

Made: TypeAlias = RandomIds | SyntheticText | TextFile
"""Sources that make prompts of any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What users send."""

    source: Made | PromptFile = field(default_factory=RandomIds)
    prompt: Lengths = DEFAULT_LENGTH
    """Of prompts that are made, after their prefix. A file's prompts have their own."""
    completion: Lengths | None = None
    """max_tokens. None: what the file says, else 128."""
    prefixes: int = 0
    """How many different beginnings prompts share, in turn: of 2, prompts 0, 2, 4 have the first. 0: none."""
    prefix_tokens: int = 0
    """Length of each."""
    distinct: int | None = None
    """How many requests differ before they repeat. None: all."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool | None = None
    """None: yes where the completion's length is said, by `completion` or the file, or the prompt means nothing."""
    misbehave: Mapping[str, float] = field(default_factory=dict)
    """Shares of requests by conduct: cancel, slow, churn, bad."""
    pause_s: float = 0.5
    """How long a slow reader pauses before each message."""

    def __post_init__(self) -> None:
        check_shares(self.misbehave)
        if self.distinct is not None and self.distinct < 1:
            raise ValueError(f"distinct is {self.distinct}; it must be at least 1")
        if self.prefixes < 0 or self.prefix_tokens < 0 or (self.prefixes == 0) != (self.prefix_tokens == 0):
            raise ValueError(
                f"prefixes is {self.prefixes} and prefix_tokens {self.prefix_tokens}; both must be above 0, or both 0"
            )
        for stop in self.stop:
            if problem := unsendable(stop):
                raise ValueError(f"stop {problem}, which cannot be sent")
        if not 0 <= self.pause_s <= 3600:
            raise ValueError(f"pause_s is {self.pause_s:g}; it must lie in 0 .. 3,600")


def notes(workload: Workload) -> tuple[str, ...]:
    """What the report must say of the workload's file: what was passed over, and what was not read."""
    file = workload.source
    return (*file.notes, *file.passed_over.sentences(file.name)) if isinstance(file, PromptFile) else ()


def describe(workload: Workload) -> str:
    """Words for the report.

    >>> describe(Workload(prefixes=2, prefix_tokens=256, misbehave={"cancel": 0.1}))
    'random token ids; prompts 128 tokens after one of 2 shared prefixes of 256; completions 128 tokens; cancel 10 %'
    """
    completion = f"completions {workload.completion or DEFAULT_LENGTH} tokens"
    prefix = f" after one of {workload.prefixes} shared prefixes of {workload.prefix_tokens}" * bool(workload.prefixes)
    if isinstance(workload.source, PromptFile):
        parts = [f"{workload.source}{prefix}, without those that do not fit the context", completion]
        if workload.completion is None:
            parts[1] = f"completions as long as the file says, else {DEFAULT_LENGTH} tokens"
    else:
        parts = [str(workload.source), f"prompts {workload.prompt} tokens{prefix}", completion]
        if workload.prompt.maximum is None:
            parts.append("prompts cut to leave the context room for the completion")
    if workload.completion is not None and workload.completion.maximum is None:
        parts.append("completions cut where the context ends")
    if workload.distinct is not None:
        parts.append(f"{workload.distinct:,} different requests, repeated")
    if workload.temperature:
        parts.append(f"temperature {workload.temperature:g}")
    parts.extend(f"{kind} {100 * share:g} %" for kind, share in workload.misbehave.items() if share)
    return "; ".join(parts)
