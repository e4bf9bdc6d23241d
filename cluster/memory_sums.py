"""The memory that a pipeline's stages need, compared with the memory where they may run. Sums of plain numbers.

The needs of stages that share a place add up. Ray chooses the places afterwards, so each place has to hold the most
demanding of the stages that it may get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tramontane.stages.stage_memory import StageMemory


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of a place where stages may run: a node's, or a GPU's. Amounts are bytes."""

    place: str
    """The place's name, for people: `this machine`."""
    free: int
    """What all stages together may take there."""
    stages: int
    """The most stages that may run there."""
    each: int
    """What each stage takes beside weights, KV and buffers: its process, or the device's context."""


@dataclass(frozen=True, kw_only=True)
class MemorySum:
    """The memory that the most demanding stages need at one place."""

    room: Room
    stages: int
    weights: int
    kv: int
    buffers: int
    """What is needed beside weights and KV, while loading or in a step: whichever total is larger."""

    @property
    def processes(self) -> int:
        """What the stages' processes take."""
        return self.stages * self.room.each

    @property
    def total(self) -> int:
        """What all the stages need."""
        return self.weights + self.kv + self.buffers + self.processes

    @property
    def over(self) -> int:
        """The bytes that are lacking; a negative number is what is left."""
        return self.total - self.room.free

    def __str__(self) -> str:
        """The sum as a sentence.

        >>> room = Room(place="a node", free=8 * 2**30, stages=2, each=2**29)
        >>> print(sum_at(room, [StageMemory(weights=3 * 2**30, loading=0, buffers=2**28)] * 2, kv=[2**29, 2**30]))
        2 stages need 9.0 GiB of 8.0 GiB on a node: weights 6.0 GiB, KV 1.5 GiB, buffers 512 MiB, processes 1.0 GiB
        """
        parts = {"weights": self.weights, "KV": self.kv, "buffers": self.buffers, "processes": self.processes}
        told = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
        who = "1 stage needs" if self.stages == 1 else f"{self.stages} stages need"
        return f"{who} {in_units(self.total)} of {in_units(self.room.free)} on {self.room.place}: {told}"


def sum_at(room: Room, stages: Sequence[StageMemory], kv: Sequence[int]) -> MemorySum:
    """The sum at one place. `kv` has the bytes of keys and values of each stage."""
    demanding = sorted(zip(stages, kv, strict=True), key=lambda each: each[0].need(each[1]), reverse=True)
    there = demanding[: room.stages]
    return MemorySum(
        room=room,
        stages=len(there),
        weights=sum(stage.weights for stage, _ in there),
        kv=sum(own for _, own in there),
        buffers=sum(stage.need(own) - stage.weights - own for stage, own in there),
    )


def worst_sum(rooms: Sequence[Room], stages: Sequence[StageMemory], kv: Sequence[int]) -> MemorySum | None:
    """The sum of the place where most is lacking, or least is left; None where no stage can run in any of `rooms`."""
    sums = (sum_at(room, stages, kv) for room in rooms if room.stages)
    return max(sums, key=lambda each: each.over, default=None)


def in_units(size: int) -> str:
    """A number of bytes, for people.

    >>> in_units(2**20), in_units(1536 * 2**20), in_units(512 * 2**20)
    ('1 MiB', '1.5 GiB', '512 MiB')
    """
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{-(-size // 2**20)} MiB"
