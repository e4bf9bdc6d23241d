"""What a scheduler is told once: the limits of a pipeline, carried whole from `serve` to the router."""

from __future__ import annotations

from dataclasses import dataclass

from tramontane.stages.kv_layout import KVLayout


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """Limits of one pipeline. None lets the router find out by itself."""

    layout: KVLayout
    context: int
    """Prompt and completion together, in tokens."""
    max_batch_tokens: int
    """Rows of one microbatch."""
    max_waiting: int
    """Requests that may wait for room."""
    decode_groups: int | None = None
    """Microbatches that decode goes round in; None is one a stage."""
    max_queue_wait_s: float = 0.0
    """Longest wait, by estimate, that a request may begin; 0 is any."""
    max_running: int | None = None
    """Sequences that run at a time. None: as many as raise measured tokens a second."""
    max_step_s: float | None = None
    """Longest step while others decode. None: one and a half times a decode step of as many rows as are worth while."""
