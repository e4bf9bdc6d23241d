"""What a service should be: decided once by `serve`, kept in Ray's key-value store, acted on by the controller.

The controller adds what was loaded, so that one that comes back serves just that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack

from tramontane.cluster.entrance import Entrance
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.variants import KernelChoice, Variants

NAMESPACE = "tramontane"
"""Ray's namespace for every actor and placement group of the service."""
SPEC_KEY = b"spec"
"""The key of the service's record in Ray's key-value store."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What the stages have loaded. It is served from then on, whatever becomes of the folder."""

    version: str
    row_invariant: bool
    tensors: dict[str, bytes]
    """The digest of each tensor, by name."""


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
    files: dict[str, bytes]
    """Digests of its small files (`SmallFiles.digests`): a part that finds others does not join."""
    spans: tuple[tuple[int, int], ...]
    """Each stage's layers, [first, last)."""
    dtype: str
    quantize: str | None
    """int8: the weights of all products are held in 8 bits. None: in `dtype`."""
    device: str
    """cpu or cuda."""
    kernels: str | None
    """The kernel set or variant that the operator wants; None leaves it to the nodes' CPUs."""
    allow_mixed_numerics: bool
    """Stages may compute with different kernels where none run on all of their nodes."""
    scheduler: SchedulerOptions
    sampleable_ids: int
    """Ids from this one on are spare rows of the embedding, never sampled."""
    unnamed_ids: tuple[int, ...]
    """Ids below it that no file names, never sampled either."""
    cpus_per_stage: float
    threads: int
    """Threads of a stage's step, on the CPU."""
    entrance: Entrance
    """Where and how the gateway lets users in."""
    hang_limit_s: float
    """A step, or an answer of the router, that takes longer breaks the pipeline."""
    link_silence_s: float
    """A link between parts on which nothing has arrived for so long is closed."""
    log_level: str
    stage_kernels: tuple[KernelChoice, ...] = ()
    """The kernels of each stage, also of one that starts later. The controller chooses them once it knows the nodes."""
    context_lowered: str = ""
    """Why the context is less than the checkpoint's although nobody asked for less, as a clause; else empty."""
    memory_sum: str = ""
    """The memory that stages need at the fullest place, as a sentence; empty where no place's memory is known."""
    loaded: Loaded | None = None
    """None until all stages have loaded; the controller adds it."""

    @property
    def stages(self) -> int:
        """Stages of a pipeline."""
        return len(self.spans)

    @property
    def has_mixed_numerics(self) -> bool:
        """Whether stages compute with different kernels."""
        return len(set(self.stage_kernels)) > 1

    @property
    def context(self) -> int:
        """Prompt and completion together, in tokens."""
        return self.scheduler.context

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
        scheduler = values["scheduler"]
        nested: dict[str, Any] = {
            "scheduler": SchedulerOptions(**(scheduler | {"layout": KVLayout(**scheduler["layout"])})),
            "entrance": Entrance(**values["entrance"]),
        }
        nested["stage_kernels"] = tuple(_choice(**choice) for choice in values["stage_kernels"])
        if values["loaded"] is not None:
            nested["loaded"] = Loaded(**values["loaded"])
        return cls(**(values | nested))


def _choice(kernels: str, variants: dict[str, str] | None) -> KernelChoice:
    return KernelChoice(kernels=kernels, variants=None if variants is None else Variants(**variants))


def names_in(record: bytes) -> tuple[str, str]:
    """Identity and model in a record of `encode`, which another version of ours may have written with other fields."""
    values: dict[str, Any] = msgpack.unpackb(record, use_list=False)
    return values["identity"], values["name"]


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
