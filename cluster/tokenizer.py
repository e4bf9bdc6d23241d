"""A checkpoint's SentencePiece tokenizer: text into ids, and the bytes that each id prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tramontane.stages.checkpoint import check_tokenizer_size
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import TOKENIZER, SmallFiles

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece."""


class Tokenizer:
    """Wraps SentencePiece. User text never becomes a control token: SentencePiece reads `<s>` as three characters.

    Decoding is done from `surfaces` in `text.py`, since a stream needs the bytes of each id on its own.
    """

    def __init__(self, serialized: bytes, *, bos_id: int | None) -> None:
        model = ModelProto.FromString(serialized)
        self._processor = SentencePieceProcessor(model_proto=serialized)
        self.size: int = self._processor.vocab_size()
        """Ids are 0 .. size - 1."""
        self.bos_id = bos_id if bos_id is not None else _id_or_none(self._processor.bos_id())
        """What goes before a text prompt; None where the model has no such id."""
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.surfaces: tuple[bytes, ...] = tuple(map(self._surface, range(self.size)))
        """UTF-8, or a part of a character, that each id prints within a text. Control ids print nothing."""
        self.spaced: frozenset[int] = frozenset(
            token_id for token_id in range(self.size) if self._processor.id_to_piece(token_id).startswith(SPACE)
        )
        """Ids whose piece begins with a space of SentencePiece's own kind; the byte 0x20 is not one."""
        self.drops_first_space: bool = (
            model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces
        )
        """Encoding puts a space before the text, so decoding takes one from its beginning."""
        self.drops_leading_spaces: bool = model.normalizer_spec.remove_extra_whitespaces
        """Decoding takes all of them from its beginning."""

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> Tokenizer | None:
        """`read` of a checkpoint folder."""
        return cls.read(SmallFiles.read(folder, [TOKENIZER]), config)

    @classmethod
    def read(cls, files: SmallFiles, config: ModelConfig) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder, or None where it has none.

        BOS is the configuration's, else the tokenizer's own.

        Raises:
            ValueError: the file cannot be read, or it has more ids than the embedding has rows.
        """
        path, content = files.folder / TOKENIZER, files.contents[TOKENIZER]
        if content is None:
            return None
        try:
            tokenizer = cls(content, bos_id=config.bos_id)
        except Exception as error:  # SentencePiece and protobuf raise several unrelated classes
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: not a SentencePiece model: {reason}") from error
        check_tokenizer_size(tokenizer.size, config, path)
        if tokenizer.bos_id is not None and tokenizer.bos_id >= config.vocab:
            raise ValueError(f"bos_token_id is {tokenizer.bos_id}, and the vocabulary has {config.vocab} ids")
        return tokenizer

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Cut text into ids. Megabytes take seconds, during which other threads run."""
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """SentencePiece's own joining of ids, kept as the second road for tests of `text.py`."""
        return str(self._processor.decode(list(ids)))

    def _surface(self, token_id: int) -> bytes:
        processor, piece = self._processor, self._processor.id_to_piece(token_id)
        if processor.is_control(token_id):
            return b""
        if processor.is_unknown(token_id):
            return str(processor.decode([token_id])).encode()
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE, " ").encode()


def _id_or_none(token_id: int) -> int | None:
    """SentencePiece says -1 where a special id does not exist."""
    return token_id if token_id >= 0 else None
