"""A checkpoint's SentencePiece tokenizer: text into ids, and the bytes that each id prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    NormalizerSpec,
    TrainerSpec,
)

from tramontane.cluster.steps import Steps
from tramontane.cluster.vocabulary import SPACE
from tramontane.stages.checkpoint import check_tokenizer_size
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import TOKENIZER, SmallFiles
from tramontane.stages.microbatch import Int32Array

STEP_CHARACTERS = 1 << 16
"""A step of a long text: about 5 ms."""


class TooLong(ValueError):  # noqa: N818  (what it says, not what it is)
    """A text has more ids than it may; `tokens` says how many, or "at least" how many where counting has stopped."""

    def __init__(self, count: int, *, exact: bool) -> None:
        self.tokens = f"{count}" if exact else f"at least {count}"
        super().__init__(self.tokens)


class Tokenizer:
    """Wraps SentencePiece. User text never becomes a control token: SentencePiece reads `<s>` as three characters.

    The `Vocabulary` takes its ids from here. `text.py` decodes by it, since a stream needs the bytes of each single id.
    """

    def __init__(self, serialized: bytes, *, bos_id: int | None) -> None:
        model = ModelProto.FromString(serialized)
        self._processor = SentencePieceProcessor(model_proto=serialized)
        self._bare = SentencePieceProcessor(model_proto=_without_normalizer(model))
        self._cut = _cut(model)
        self._longest = _longest_piece(model)
        self._may_shorten = bool(
            model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces
        )
        self.size: int = self._processor.vocab_size()
        """Ids are 0 .. size - 1."""
        self.bos_id = bos_id if bos_id is not None else _id_or_none(self._processor.bos_id())
        """What goes before a text prompt; None where the model has no such id."""
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.surfaces: tuple[bytes, ...] = tuple(map(self._surface, range(self.size)))
        """UTF-8, or a part of a character, that each id prints within a text. Control ids print nothing."""
        self.control: frozenset[int] = frozenset(filter(self._processor.is_control, range(self.size)))
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

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, as SentencePiece writes it; None where there is none."""
        token_id: int = self._processor.piece_to_id(piece)  # that of `<unk>` for one that it lacks
        return token_id if self._processor.id_to_piece(token_id) == piece else None

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Cut text into ids."""
        ids: list[int] = self._processor.encode(text)
        return [*self._begin(add_bos), *ids]

    def encode_in_steps(self, text: str, *, add_bos: bool, most: int) -> Steps[Int32Array]:
        """The ids of `encode`, BOS among them, if there are at most `most`.

        The first step only looks at the text's size. In the others SentencePiece lets other threads run.

        Raises:
            TooLong: there are more. It comes as soon as that is certain; a text that fits is never refused.
        """
        begin = np.array(self._begin(add_bos), np.int32)
        if not self._may_shorten:
            self._check(len(begin), text, most)
        yield
        normalized = self._processor.normalize(text)
        self._check(len(begin), normalized, most)
        yield
        parts, count = [begin], len(begin)
        for start, end in self._slices(normalized):
            parts.append(self._bare.encode(normalized[start:end], return_type="numpy"))
            count += len(parts[-1])
            if count > most:
                raise TooLong(count, exact=end == len(normalized))
            yield
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """SentencePiece's own joining of ids, kept as the second road for tests of `text.py`."""
        return str(self._processor.decode(list(ids)))

    def _begin(self, add_bos: bool) -> list[int]:
        return [self.bos_id] if add_bos and self.bos_id is not None else []

    def _check(self, begin: int, text: str, most: int) -> None:
        """Refuse what is too long even if all of it were the longest piece."""
        if self._longest is not None:
            least = begin + -(-len(text.encode()) // self._longest)
            if least > most:
                raise TooLong(least, exact=False)

    def _slices(self, normalized: str) -> Iterator[tuple[int, int]]:
        """Begin and end of what can be encoded on its own; without a place to cut, that is all there is."""
        start = 0
        while start < len(normalized):
            cut = None if self._cut is None else self._cut.search(normalized, start + STEP_CHARACTERS)
            end = len(normalized) if cut is None else cut.end() - 1
            yield start, end
            start = end

    def _surface(self, token_id: int) -> bytes:
        processor, piece = self._processor, self._processor.id_to_piece(token_id)
        if processor.is_control(token_id):
            return b""
        if processor.is_unknown(token_id):
            return str(processor.decode([token_id])).encode()
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE, " ").encode()


def _without_normalizer(model: ModelProto) -> bytes:
    """The model for text that is normalized already. (Its test samples, which a normalizer belongs to, stay behind.)"""
    bare = ModelProto(
        pieces=model.pieces,
        trainer_spec=model.trainer_spec,
        normalizer_spec=NormalizerSpec(
            name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
        ),
    )
    return bytes(bare.SerializeToString())


def _pieces_of_text(model: ModelProto) -> list[str]:
    """What text is cut into, beside bytes and unknown characters; `unused` pieces lead the merges of others."""
    kinds = ModelProto.SentencePiece
    return [piece.piece for piece in model.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]


def _cut(model: ModelProto) -> re.Pattern[str] | None:
    """A pattern for places where text can be cut: a space after another character. None for models that forbid it.

    Where no piece crosses such a place, no merge does, so the ids of both sides, one after the other, are the whole's.
    That holds for byte-pair models as they are usually trained, in which a space only begins a piece. A unigram model
    adds up scores from the text's beginning, so rounding could tip a close choice.
    """
    cut, pieces = re.compile(f"[^{SPACE}]{SPACE}"), _pieces_of_text(model)
    by_pairs = model.trainer_spec.model_type == TrainerSpec.BPE
    return cut if by_pairs and SPACE in pieces and not any(map(cut.search, pieces)) else None


def _longest_piece(model: ModelProto) -> int | None:
    """In bytes of normalized text; None where there is no such limit, since a run of unknown characters is one id."""
    if not model.trainer_spec.byte_fallback:
        return None
    return max(len(piece.encode()) for piece in _pieces_of_text(model))


def _id_or_none(token_id: int) -> int | None:
    """SentencePiece says -1 where a special id does not exist."""
    return token_id if token_id >= 0 else None
