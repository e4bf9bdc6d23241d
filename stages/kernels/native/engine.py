"""A variant of the native library with threads and working memory of one caller."""

from __future__ import annotations

import os
import weakref

import torch

from tramontane.stages.kernels.native import interface
from tramontane.stages.kernels.native.build import library


class Engine:
    """Makes the library's calls, one at a time.

    Raises:
        NativeUnavailable: the library cannot be had.
    """

    def __init__(self, variant: str) -> None:
        self.library = interface.declare(library(variant))
        self._handle = self.library.tramontane_create()
        weakref.finalize(self, self.library.tramontane_destroy, self._handle)

    def call(self, name: str, *arguments: object) -> int | None:
        """A function that works on several threads: those that the calling one wants, but no more than it has cores.

        Returns the library's answer: None of a function that has none.
        """
        answer: int | None = getattr(self.library, f"tramontane_{name}")(self._handle, _threads(), *arguments)
        return answer


def _threads() -> int:
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
