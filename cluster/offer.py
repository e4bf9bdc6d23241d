"""What a gateway has to offer: a model and the pipelines that serve it, or the reason why there is nothing."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

import grpc

from tramontane.cluster.errors import CallError
from tramontane.cluster.pipeline import Pipeline
from tramontane.cluster.served_model import ServedModel

log = logging.getLogger(__name__)

SHOWN_NAME = 128
"""Characters of an unknown model's name that an error repeats."""


class Offer:
    """Serving means: a model is set, at least one of its pipelines is whole, and the gateway is not draining."""

    def __init__(self, model_name: str, on_change: Callable[[], None]) -> None:
        self.model_name = model_name
        self.model: ServedModel | None = None
        self._on_change = on_change
        self._pipelines: tuple[Pipeline, ...] = ()
        self._generation = -1
        self._reason = "loading, 0 %"
        self._draining = False

    @property
    def whole(self) -> list[Pipeline]:
        """The pipelines of the routes that can take a request."""
        return [pipeline for pipeline in self._pipelines if not pipeline.broken.done()]

    @property
    def generation(self) -> int:
        """Of the route table; below 0 before there is one."""
        return self._generation

    @property
    def serving(self) -> bool:
        """A request would be taken now."""
        return self.model is not None and bool(self.whole) and not self._draining

    @property
    def reason(self) -> str:
        """Why it is not serving, for users."""
        return "the server is shutting down" if self._draining else self._reason

    def require(self, name: str | None) -> ServedModel:
        """The model called `name`, or the only one.

        Raises:
            CallError: NOT_FOUND for another name, UNAVAILABLE while the model is not there.
        """
        if name is not None and name != self.model_name:
            raise CallError(
                grpc.StatusCode.NOT_FOUND,
                f"model {name[:SHOWN_NAME]!r} is not served here; served is {self.model_name!r}",
                field="model",
            )
        if self.model is None:
            raise CallError(grpc.StatusCode.UNAVAILABLE, self.reason)
        return self.model

    def choose(self) -> Pipeline:
        """The one with fewer outstanding tokens of two pipelines drawn at random.

        Raises:
            CallError: UNAVAILABLE, where none can take a request.
        """
        if not self.serving:
            raise CallError(grpc.StatusCode.UNAVAILABLE, self.reason)
        whole = self.whole
        pair = random.sample(whole, min(2, len(whole)))
        return min(pair, key=lambda pipeline: pipeline.outstanding_tokens)

    def set_reason(self, reason: str) -> None:
        """What users hear as long as nothing serves."""
        self._reason = reason

    def set_model(self, model: ServedModel) -> None:
        """The model is known and loaded."""
        assert model.name == self.model_name, f"model {model.name!r} set, {self.model_name!r} announced"
        self.model = model
        self._on_change()

    async def set_routes(self, generation: int, pipelines: Sequence[Pipeline]) -> None:
        """Exchange the route table for a newer one. The pipelines become the gateway's own.

        One that is no longer in the table gets no new request, and is closed when its last one has ended. A table that
        is not newer is ignored, and what came with it is closed.
        """
        if generation <= self._generation:
            log.info("routes of generation %d ignored, at generation %d", generation, self._generation)
            strangers = [pipeline for pipeline in pipelines if pipeline not in self._pipelines]
            await asyncio.gather(*(pipeline.close() for pipeline in strangers))
            return
        self._generation = generation
        self._exchange(tuple(pipelines))
        log.info("routes of generation %d: %s", generation, ", ".join(p.name for p in pipelines) or "none")

    def withdraw(self, reason: str) -> None:
        """Nothing serves until newer routes come."""
        self._reason = reason
        self._exchange(())

    def drain(self) -> None:
        """Take no new requests, for good."""
        self._draining = True
        self._on_change()

    async def close(self) -> None:
        """Close all pipelines."""
        pipelines, self._pipelines = self._pipelines, ()
        await asyncio.gather(*(pipeline.close() for pipeline in pipelines))

    def _exchange(self, pipelines: tuple[Pipeline, ...]) -> None:
        old, self._pipelines = self._pipelines, pipelines
        for pipeline in pipelines:
            if pipeline not in old:
                pipeline.broken.add_done_callback(partial(self._lost, pipeline))
        for pipeline in old:
            if pipeline not in pipelines:
                pipeline.retire()
        self._on_change()

    def _lost(self, pipeline: Pipeline, broken: asyncio.Future[str]) -> None:
        """A pipeline has ended; that of a retired one is no news."""
        if pipeline in self._pipelines:
            log.error("pipeline %s broke: %s", pipeline.name, broken.result())
            if not self.whole:
                self._reason = f"{pipeline.name} broke: {broken.result()}"
            self._on_change()
