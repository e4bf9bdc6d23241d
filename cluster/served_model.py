"""What a gateway must know of the model that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as users see it."""

    name: str
    """What users call it."""
    config: ModelConfig
    context: int
    """Prompt and completion together, in tokens; at most the checkpoint's."""
    context_lowered: str = ""
    """Why the context is less than the checkpoint's although nobody asked for less; else empty."""
    dtype: str
    stages: int
    version: str
    """Changes with weights, configuration, tokenizer, dtype or numerics."""
    row_invariant: bool
    vocabulary: Vocabulary
    tokenizer: Tokenizer | None
    """None where the checkpoint has none: ids in, ids out."""
    quantization: str = ""
    """How weights are held where that is not in `dtype`: int8."""

    def info(self, *, reason: str) -> pb.ModelInfo:
        """The model's description for users. `reason` says why it is not serving, and is empty while it is."""
        return pb.ModelInfo(
            name=self.name,
            architecture=self.config.architecture,
            context_tokens=self.context,
            window_tokens=self.config.smallest_window,
            dtype=self.dtype,
            stages=self.stages,
            version=self.version,
            row_invariant=self.row_invariant,
            vocabulary_tokens=self.vocabulary.rows,
            has_tokenizer=self.tokenizer is not None,
            serving=not reason,
            quantization=self.quantization,
            reason=reason,
            checkpoint_context_tokens=self.config.context,
            context_lowered=self.context_lowered,
        )
