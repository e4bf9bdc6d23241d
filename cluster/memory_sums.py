"""What a pipeline's stages need in memory, held against what their places have. Sums of plain numbers.

Stages that share a place add up. Which place a stage comes to is not known beforehand, so each place has to hold the
most demanding of the stages that it may get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tramontane.stages.stage_memory import StageMemory


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where stages may come to stand: a node's memory, or a GPU's. Amounts are bytes."""

    place: str
    """For people: `this machine`."""
    free: int
    """What stages may have there, all together."""
    stages: int
    """The most stages that may come there."""
    each: int
    """What a stage takes beside weights, KV and buffers: its process, or the device's own part."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What the most demanding stages need at one place."""

    room: Room
    stages: int
    weights: int
    kv: int
    buffers: int
    """For loading or for a step, whichever needs more with the KV that is there by then."""

    @property
    def processes(self) -> int:
        """What the stages take by being there."""
        return self.stages * self.room.each

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.buffers + self.processes

    @property
    def over(self) -> int:
        """What is lacking; below 0 is what is left."""
        return self.total - self.room.free

    def __str__(self) -> str:
        """A sentence.

        >>> room = Room(place="a node", free=8 * 2**30, stages=2, each=2**29)
        >>> print(sum_at(room, [StageMemory(weights=3 * 2**30, loading=0, buffers=2**28)] * 2, kv=[2**29, 2**30]))
        2 stages need 9.0 GiB of 8.0 GiB on a node: weights 6.0 GiB, KV 1.5 GiB, buffers 512 MiB, processes 1.0 GiB
        """
        parts = {"weights": self.weights, "KV": self.kv, "buffers": self.buffers, "processes": self.processes}
        told = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
        who = "1 stage needs" if self.stages == 1 else f"{self.stages} stages need"
        return f"{who} {in_units(self.total)} of {in_units(self.room.free)} on {self.room.place}: {told}"


def sum_at(room: Room, stages: Sequence[StageMemory], kv: Sequence[int]) -> Sum:
    """`kv` has an entry for each stage: the bytes of its keys and values."""
    demanding = sorted(zip(stages, kv, strict=True), key=lambda each: each[0].need(each[1]), reverse=True)
    there = demanding[: room.stages]
    return Sum(
        room=room,
        stages=len(there),
        weights=sum(stage.weights for stage, _ in there),
        kv=sum(own for _, own in there),
        buffers=sum(stage.need(own) - stage.weights - own for stage, own in there),
    )


def worst_sum(rooms: Sequence[Room], stages: Sequence[StageMemory], kv: Sequence[int]) -> Sum | None:
    """Where most is lacking, or least is left; None where there are no rooms."""
    sums = (sum_at(room, stages, kv) for room in rooms if room.stages)
    return max(sums, key=lambda each: each.over, default=None)


def in_units(size: int) -> str:
    """Bytes for people.

    >>> in_units(2**20), in_units(1536 * 2**20), in_units(512 * 2**20)
    ('1 MiB', '1.5 GiB', '512 MiB')
    """
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{-(-size // 2**20)} MiB"
