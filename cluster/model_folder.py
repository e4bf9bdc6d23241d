"""The model's folder as one part of the service finds it: it uses what the service has loaded, and nothing else.

A folder may change while the service runs, or differ from node to node. A part that starts and finds other bytes says
so in one line and does not join; those that have loaded go on with what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.spec import ServiceSpec
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import CONFIG, OtherBytes, SmallFiles


class ModelFolder:
    """For the part called `part` on the node called `node`. Every method raises OtherBytes with both names."""

    def __init__(self, spec: ServiceSpec, *, part: str, node: str) -> None:
        self._spec = spec
        self._part = part
        self._node = node

    def config(self) -> ModelConfig:
        """For a stage, which needs no tokenizer."""
        files = SmallFiles.read(self._spec.path, [CONFIG])
        with self._named():
            files.check(self._spec.files)
        return ModelConfig.read(files)

    def check_tensors(self, config: ModelConfig, digests: Mapping[str, bytes]) -> None:
        """Compare what a stage has read with what the service serves; nothing, as long as it does not."""
        if self._spec.loaded is not None:
            with self._named():
                Checkpoint.open(self._spec.path, config).check_digests(digests, self._spec.loaded.tensors)

    def served_model(self, version: str, row_invariant: bool) -> ServedModel:
        """For a gateway."""
        spec, files = self._spec, SmallFiles.read(self._spec.path)
        with self._named():
            files.check(spec.files)
        config = ModelConfig.read(files)
        tokenizer = Tokenizer.read(files, config)
        return ServedModel(
            name=spec.name,
            config=config,
            context=spec.context,
            context_lowered=spec.context_lowered,
            dtype=spec.dtype,
            stages=spec.stages,
            version=version,
            row_invariant=row_invariant,
            vocabulary=Vocabulary.read(files, config.vocab, tokenizer),
            tokenizer=tokenizer,
            quantization=spec.quantize or "",
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OtherBytes as error:
            raise OtherBytes(f"{self._part} on node {self._node} does not join: {error}") from None
