"""What a service should be: decided once by `serve`, kept in Ray's key-value store, acted on by the controller."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack

from tramontane.cluster.entrance import Entrance
from tramontane.stages.kv_layout import KVLayout

NAMESPACE = "tramontane"
"""Ray's namespace for every actor and placement group of the service."""


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """All that the controller needs to create the service's parts, again and again.

    It holds no secret, only the paths of files that do.
    """

    identity: str
    """A random name of this service: parts of another one are left alone."""
    generation: int
    """Counts up with each change."""
    name: str
    """The model's name towards users."""
    model_dir: str
    """The checkpoint's folder, at the same path on every node."""
    spans: tuple[tuple[int, int], ...]
    """Each stage's layers, [first, last)."""
    dtype: str
    quantize: str | None
    """int8: the weights of all products are held in 8 bits. None: in `dtype`."""
    device: str
    """cpu or cuda."""
    layout: KVLayout
    context: int
    """Prompt and completion together, in tokens."""
    sampleable_ids: int
    """Ids from this one on are spare rows of the embedding, never sampled."""
    max_batch_tokens: int
    max_waiting: int
    decode_groups: int | None
    """Microbatches that decode goes round in; None is one a stage."""
    cpus_per_stage: float
    threads: int
    """Threads of a stage's step, on the CPU."""
    entrance: Entrance
    """Where and how the gateway lets users in."""
    link_silence_s: float
    """A link between parts on which nothing has arrived for so long is closed."""
    log_level: str

    @property
    def stages(self) -> int:
        """Stages of a pipeline."""
        return len(self.spans)

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.model_dir)

    def span(self, stage: int) -> range:
        """The layers of one stage."""
        return range(*self.spans[stage])

    def stage_resources(self) -> dict[str, float]:
        """What a stage asks of Ray: one bundle of the pipeline's placement group."""
        return {"GPU": 1.0} if self.device == "cuda" else {"CPU": self.cpus_per_stage}

    def encode(self) -> bytes:
        """The record for Ray's key-value store."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def decode(cls, record: bytes) -> ServiceSpec:
        """Read a record of `encode`."""
        values: dict[str, Any] = msgpack.unpackb(record, use_list=False)
        nested = {"layout": KVLayout(**values["layout"]), "entrance": Entrance(**values["entrance"])}
        return cls(**(values | nested))


def stage_name(replica: int, stage: int) -> str:
    """The actor's name.

    >>> stage_name(0, 1)
    'stage-0.1'
    """
    return f"stage-{replica}.{stage}"


def router_name(replica: int) -> str:
    """The actor's name: `router-0`."""
    return f"router-{replica}"


def gateway_name(index: int) -> str:
    """The actor's name: `gateway-0`."""
    return f"gateway-{index}"


CONTROLLER = "controller"
"""The controller's actor name; a Ray cluster has one service."""
