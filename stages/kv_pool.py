"""A stage's binding to one router: the epoch, the step that must come next, and the KV pools of its window classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import Kernels, KVStorage
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int32Array, Microbatch


class StaleEpoch(ValueError):  # noqa: N818  (says what is wrong, as OutOfOrder does)
    """The microbatch belongs to another binding."""


class OutOfOrder(ValueError):  # noqa: N818
    """The microbatch is not the step after the last: a gap or a repetition would corrupt the rings."""


@dataclass(frozen=True)
class KVPool:
    """The blocks of one window class at one stage, for its layers of that class."""

    kernels: Kernels
    storage: KVStorage
    blocks: int

    @torch.inference_mode()
    def fill(self, blocks: Int32Array, value: float = 0.0) -> None:
        """Set every key and value of the given blocks, in all layers."""
        if len(blocks):
            inside = (blocks >= 0) & (blocks < self.blocks)
            assert inside.all(), f"blocks {blocks[~inside]} of a pool of {self.blocks}"
            self.kernels.fill(self.storage, blocks, value)


class Binding:
    """One router's hold on the stage. A new binding starts with step 0 and empty pools."""

    def __init__(
        self,
        config: ModelConfig,
        span: range,
        kernels: Kernels,
        *,
        epoch: int,
        layout: KVLayout,
        context: int,
        max_tokens: int,
    ) -> None:
        assert layout.windows == config.window_classes, f"layout {layout.windows}, model {config.window_classes}"
        self.epoch = epoch
        self.layout = layout
        self.context = context
        self.max_tokens = max_tokens
        self.next_step = 0
        members = {
            index: [layer for layer in span if config.windows[layer] == window]
            for index, window in enumerate(layout.windows)
        }
        self.pools = {
            index: KVPool(
                kernels,
                kernels.allocate(layout.pool_blocks[index], layout.block, len(layers)),
                layout.pool_blocks[index],
            )
            for index, layers in members.items()
            if layers
        }
        """The pools of the classes that this stage has layers of, by the class's place in `layout.windows`."""
        self.place = {layer: (index, n) for index, layers in members.items() for n, layer in enumerate(layers)}
        """Each layer's class, and its place among this stage's layers of that class."""

    @property
    def classes(self) -> Sequence[int]:
        """The window classes that this stage has layers of."""
        return tuple(self.pools)

    def admit(self, microbatch: Microbatch) -> None:
        """Check that the microbatch is the next one, and count it.

        Raises:
            StaleEpoch: it belongs to another binding.
            OutOfOrder: it is not the step after the last.
            ValueError: it is larger than was agreed, goes beyond the context, or its pieces are not its rows.
        """
        if microbatch.epoch != self.epoch:
            raise StaleEpoch(f"microbatch of epoch {microbatch.epoch}; the stage is bound at {self.epoch}")
        if microbatch.step != self.next_step:
            raise OutOfOrder(f"microbatch has step {microbatch.step}; the next is {self.next_step}")
        if not 0 < len(microbatch.tokens) <= self.max_tokens:
            raise ValueError(f"microbatch has {len(microbatch.tokens)} tokens; the stage takes 1 to {self.max_tokens}")
        length = microbatch.length
        if length.min() < 1 or length.sum() != len(microbatch.tokens):
            raise ValueError(f"microbatch has pieces of {length} rows, and {len(microbatch.tokens)} tokens")
        last = int(microbatch.position.max())
        if last >= self.context:
            raise ValueError(f"microbatch has a token at position {last}; the context is {self.context}")
        self.next_step += 1

    def clear_fresh(self, microbatch: Microbatch) -> None:
        """Fill the blocks newly taken with zeros, so that nobody reads what their last owner left."""
        for index, pool in self.pools.items():
            pool.fill(microbatch.tables[index].fresh)
