"""Which layers go to which stage: consecutive slices of about equal cost.

A stage's cost is the bytes of weights that it reads for 16 decode rows, the head counted: decode is bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.stages.config import ModelConfig

DECODE_ROWS = 16


def layer_cost(config: ModelConfig) -> float:
    """Parameters of one layer that `DECODE_ROWS` rows are expected to touch.

    With k of E experts chosen evenly by each row, an expert is read with probability 1 - (1 - k/E)^rows.
    """
    attention = config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    expert = 3 * config.dim * config.ffn_dim
    if not config.experts:
        return attention + expert
    unread = (1 - config.experts_per_token / config.experts) ** DECODE_ROWS
    return attention + config.dim * config.experts + expert * config.experts * (1 - unread)


def head_cost(config: ModelConfig) -> float:
    """Parameters of the output head; all of them are read whenever a row is sampled."""
    return config.dim * config.vocab


def split_layers(config: ModelConfig, stages: int) -> tuple[range, ...]:
    """Cut the layers into `stages` consecutive slices so that the costliest stage costs least.

    Raises:
        ValueError: there are more stages than layers, or none.
    """
    if not 1 <= stages <= config.layers:
        raise ValueError(f"stages is {stages}; a model of {config.layers} layers takes 1 to {config.layers}")
    layer, head = layer_cost(config), head_cost(config)
    # Layers cost the same and only the last stage has the head, so the best cut gives the last stage some number of
    # layers and spreads the rest evenly, larger slices first.
    bodies = range(1, config.layers - stages + 2)

    def costliest(last: int) -> float:
        others = -(-(config.layers - last) // (stages - 1)) if stages > 1 else 0
        return max(others * layer, last * layer + head)

    last = min(bodies, key=lambda count: (costliest(count), -count)) if stages > 1 else config.layers
    rest, others = config.layers - last, max(stages - 1, 1)
    counts = [rest // others + (index < rest % others) for index in range(stages - 1)] + [last]
    return split_as(config, counts)


def split_as(config: ModelConfig, counts: Sequence[int]) -> tuple[range, ...]:
    """Cut the layers into slices of the given lengths.

    >>> from tramontane.stages.config import EXAMPLE
    >>> split_as(EXAMPLE, [3, 1])
    (range(0, 3), range(3, 4))

    Raises:
        ValueError: the lengths do not add up to the model's layers, or one is below 1.
    """
    if any(count < 1 for count in counts) or sum(counts) != config.layers:
        raise ValueError(
            f"split is {','.join(map(str, counts))}, {sum(counts)} layers; the model has {config.layers}, and every "
            "stage takes at least 1"
        )
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
