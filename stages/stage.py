"""A consecutive slice of the layers on one device, stepping through microbatches in order.

    load      read, check and pack this stage's own tensors, one layer at a time
    bind      a router takes hold of it: a fresh KV pool, step 0
    inbox     where the rows of the next microbatch are received            (not on the first stage)
    step      embed or enter -> my blocks -> rows for the next stage, or norm, head, sampler -> StepResult

Letters: T rows of the microbatch, D model dim, M some rows, N rows that are sampled or scored, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig
from tramontane.stages.counters import StageStats
from tramontane.stages.identity import numerics_id
from tramontane.stages.inbox import Inbox
from tramontane.stages.kernels import Block, Kernels, PackedEmbedding, PackedHead, PackedLayer, choose_kernels
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.kv_pool import Binding, KVPool, StaleEpoch
from tramontane.stages.microbatch import Int32Array, Microbatch, StepResult
from tramontane.stages.result import asked_rows, choose
from tramontane.stages.variants import KernelChoice
from tramontane.stages.weights import WeightReader

log = logging.getLogger(__name__)


class Stage:
    """Some consecutive layers of a model, with the embedding at the first and the head at the last stage.

    `step` belongs to one thread, `inbox` may be called from another. Attributes are safe to read from any.
    """

    def __init__(
        self,
        config: ModelConfig,
        span: range,
        kernels: Kernels,
        *,
        device: str,
        embedding: PackedEmbedding | None,
        layers: dict[int, PackedLayer],
        head: PackedHead | None,
        digests: dict[str, bytes],
        sampleable_ids: int,
        unnamed_ids: Sequence[int],
    ) -> None:
        self.config = config
        self.span = span
        self.digests = digests
        """Of each tensor that this stage owns, over every byte, by name; see `tensor_digest.py`."""
        self.numerics = numerics_id(device, kernels.name, torch_computes=kernels.torch_computes)
        self.row_invariant = kernels.row_invariant
        self.stats = StageStats()
        self.epoch = 0
        """The highest epoch bound; 0 before any."""
        self._kernels = kernels
        self._pinned = torch.device(device).type == "cuda"
        self._embedding = embedding
        self._layers = layers
        self._head = head
        self._sampleable_ids = sampleable_ids
        self._unnamed_ids = np.array(unnamed_ids, np.int32)
        self._binding: Binding | None = None
        self._inbox: Inbox | None = None

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        config: ModelConfig,
        model_dir: Path,
        span: range,
        *,
        dtype: str,
        device: str,
        on_progress: Callable[[float], None] = lambda _: None,
        kernels: KernelChoice | str | None = None,
        quantize: str | None = None,
        sampleable_ids: int | None = None,
        unnamed_ids: Sequence[int] = (),
    ) -> Stage:
        """Read and pack the tensors of the layers in `span`, and embedding and head where the span touches the ends.

        `kernels` are chosen, or named as a set or variant (default: this machine's best); `quantize` "int8" holds the
        weights in 8 bits. Ids from `sampleable_ids` on (default: the vocabulary's end) are never sampled, nor are the
        `unnamed_ids` below it. `on_progress` hears fractions from 0 to 1.

        Raises:
            ValueError: the checkpoint is damaged or of another shape, or the device or kernel set is not there.
        """
        chosen = choose_kernels(config, dtype=dtype, device=device, name=kernels, quantize=quantize)
        reader = WeightReader(Checkpoint.open(model_dir, config), span, dtype, on_progress)
        is_first, is_last = span.start == 0, span.stop == config.layers
        stage = cls(
            config,
            span,
            chosen,
            device=device,
            embedding=chosen.pack_embedding(reader.embedding()) if is_first else None,
            layers={index: chosen.pack_layer(reader.layer(index)) for index in span},
            head=chosen.pack_head(reader.norm(), reader.head()) if is_last else None,
            digests=reader.digests(),
            sampleable_ids=min(sampleable_ids or config.vocab, config.vocab),
            unnamed_ids=unnamed_ids,
        )
        assert not reader.unread, f"tensors of layers {span} that nobody read: {reader.unread}"
        log.info("layers %d to %d of %s loaded: %s", span.start, span.stop - 1, model_dir.name, stage.numerics)
        return stage

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.span.start == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens are chosen here."""
        return self.span.stop == self.config.layers

    @property
    def pools(self) -> dict[int, KVPool]:
        """The KV pools of the binding, by the class's place in the layout's windows; empty before any."""
        return self._binding.pools if self._binding else {}

    @torch.inference_mode()
    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int) -> None:
        """A router takes hold of the stage: a fresh KV pool, and step 0 comes next.

        `context` bounds positions, `max_tokens` a microbatch. The former binding is gone.

        Raises:
            ValueError: the epoch is not higher than all before, or there is no memory for the pool.
        """
        if epoch <= self.epoch:
            raise ValueError(f"epoch is {epoch}; the stage was bound at {self.epoch} and takes only a higher one")
        # The old pools go first, since two may not fit; should the new ones fail, the old epoch is over all the same.
        self.epoch, self._binding = epoch, None
        try:
            self._binding = Binding(
                self.config,
                self.span,
                self._kernels,
                epoch=epoch,
                layout=layout,
                context=context,
                max_tokens=max_tokens,
            )
        except (MemoryError, OSError, RuntimeError) as error:  # torch's allocators raise the last
            raise ValueError(
                f"there is no memory for the keys and values of layers {self.span.start} to {self.span.stop - 1}, "
                f"{layout.pool_blocks} blocks: {error}; --kv-memory and --max-context change it"
            ) from error
        row_bytes = self.config.dim * self._kernels.row_dtype.itemsize
        self._inbox = None if self.is_first else Inbox(max_tokens, row_bytes, self._pinned)

    def inbox(self, tokens: int) -> memoryview:
        """Writable bytes for the rows that enter with a microbatch of so many tokens.

        Several may be out at a time; steps consume them in the order in which they were handed out.

        Raises:
            ValueError: more tokens than the binding allows.
        """
        assert self._inbox is not None, "the first stage receives no rows, and the others only when bound"
        return self._inbox.hand_out(tokens)

    def step(self, microbatch: Microbatch) -> memoryview | StepResult:
        """Compute a microbatch: rows for the next stage, as bytes of a fresh buffer, or on the last stage the result.

        Raises:
            StaleEpoch: the microbatch belongs to another binding.
            OutOfOrder: it is not the step after the last.
            ValueError: it breaks what was agreed at binding. In all three cases no row of the KV pool was touched.
        """
        begin = time.perf_counter_ns()
        with torch.inference_mode():
            rows_TD = self.forward(microbatch)
            answer = self._result(microbatch, rows_TD) if self.is_last else self._bytes(rows_TD)
        self.stats = self.stats.after_step(time.perf_counter_ns() - begin, len(microbatch.tokens))
        return answer

    @torch.inference_mode()
    def forward(self, microbatch: Microbatch) -> Tensor:
        """`step` without its end: the rows [T, D] after this stage's last block. Raises as `step` does."""
        binding, kernels = self._admit(microbatch), self._kernels
        binding.clear_fresh(microbatch)
        plans = kernels.plan(microbatch, binding.layout, binding.classes)
        if self._inbox is None:
            rows_TD = kernels.embed(self._embedding, microbatch.tokens)
        else:
            rows_TD = self._received(self._inbox, len(microbatch.tokens))
        blocks = []
        for index, layer in self._layers.items():
            window_class, place = binding.place[index]
            blocks.append(Block(layer, plans[window_class], binding.pools[window_class].storage, place))
        return kernels.blocks(blocks, rows_TD)

    @torch.inference_mode()
    def logits(self, rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        """Norm and head over rows [T, D] that left the last block, all or those with the numbers `asked_M`.

        float32 [M, V]. Last stage only.
        """
        assert self.is_last, f"layers {self.span} of {self.config.layers}: the head is at another stage"
        return self._kernels.head(self._head, rows_TD, asked_M)

    def _admit(self, microbatch: Microbatch) -> Binding:
        """The binding, if the microbatch is its next; a refused one's rows are let go, so that the next has its own."""
        try:
            if self._binding is None:
                raise StaleEpoch(f"microbatch of epoch {microbatch.epoch}; the stage is bound to no router")
            self._binding.admit(microbatch)
        except ValueError:
            if self._inbox is not None:
                self._inbox.discard()
            raise
        return self._binding

    def _received(self, inbox: Inbox, tokens: int) -> Tensor:
        """The rows of the oldest buffer handed out, copied out of it. [T, D]"""
        buffer, received = inbox.take()
        assert received == tokens, f"{received} rows were received for a microbatch of {tokens} tokens"
        dim, row_dtype = self.config.dim, self._kernels.row_dtype
        size = tokens * dim * row_dtype.itemsize
        rows_TD = self._kernels.enter(buffer[:size].view(row_dtype).view(tokens, dim))
        inbox.give_back(buffer)
        return rows_TD

    def _bytes(self, rows_TD: Tensor) -> memoryview:
        """The rows as they travel, in memory of their own: T x D values of the kernels' `row_dtype`."""
        return self._kernels.leave(rows_TD).view(torch.uint8).numpy().data.cast("B")

    def _result(self, microbatch: Microbatch, rows_TD: Tensor) -> StepResult:
        asked_N = asked_rows(microbatch)
        if len(asked_N):
            logits_NV = self.logits(rows_TD, asked_N)
        else:
            logits_NV = rows_TD.new_empty(0, self.config.vocab, dtype=torch.float32)
        return choose(self._kernels, microbatch, logits_NV, self._sampleable_ids, self._unnamed_ids)
