"""What a gateway has to offer: a model and the pipelines that serve it, or the reason why there is nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import grpc

from tramontane.cluster.errors import CallError
from tramontane.cluster.pipeline import Pipeline
from tramontane.cluster.routes import Dial, Routes
from tramontane.cluster.served_model import ServedModel
from tramontane.protos import serving_pb2 as pb

SHOWN_NAME = 128
"""Characters of an unknown model's name that an error repeats."""


class Offer:
    """Serving means: a model is set, at least one router is linked, and the gateway is not draining."""

    def __init__(self, model_name: str, dial: Dial, on_change: Callable[[], None]) -> None:
        self.model_name = model_name
        self.model: ServedModel | None = None
        self.routes = Routes(dial, on_change)
        self._on_change = on_change
        self._reason = "loading, 0 %"
        self._draining = False

    @property
    def serving(self) -> bool:
        """A request would be taken now."""
        return self.model is not None and bool(self.routes.usable) and not self._draining

    @property
    def reason(self) -> str:
        """Why it is not serving, for users."""
        if self._draining:
            return "the server is shutting down"
        trouble = self.routes.trouble
        return f"no pipeline is linked: {trouble}" if trouble else self._reason

    def infos(self) -> list[pb.ModelInfo]:
        """The model as users see it; none while it is not loaded."""
        return [] if self.model is None else [self.model.info(reason="" if self.serving else self.reason)]

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
        usable = self.routes.usable
        pair = random.sample(usable, min(2, len(usable)))
        return min(pair, key=lambda pipeline: pipeline.outstanding_tokens)

    def set_reason(self, reason: str) -> None:
        """What users hear as long as nothing serves."""
        self._reason = reason

    def set_model(self, model: ServedModel) -> None:
        """The model is known and loaded."""
        assert model.name == self.model_name, f"model {model.name!r} set, {self.model_name!r} announced"
        self.model = model
        self._on_change()

    def withdraw(self, reason: str) -> None:
        """Nothing serves until newer routes come."""
        self._reason = reason
        self.routes.clear()

    def drain(self) -> None:
        """Take no new requests, for good."""
        self._draining = True
        self._on_change()
