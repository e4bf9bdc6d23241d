"""The GGUF that llama.cpp needs, made once by llama.cpp's own converter.

The converter asks for a tokenizer, and these models have none: it is given a stand-in of numbered pieces, beside links
to the model's own files. Ids go in and come out, so what the pieces say does not matter. The converter runs in this
environment (it needs torch, transformers and sentencepiece), with `gguf` from its own source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tramontane.stages.config import ModelConfig

OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}


def gguf_path(model: Path, number: str) -> Path:
    """Where the file of a model in that kind of number is kept."""
    return model / f"{model.name}-{OUT_TYPES[number]}.gguf"


def make_gguf(model: Path, number: str, source: Path) -> Path:
    """The file, made if it is not there; `source` is llama.cpp's source tree."""
    path = gguf_path(model, number)
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        for file in ("config.json", "model.safetensors"):
            (Path(folder) / file).symlink_to((model / file).resolve())
        (Path(folder) / "tokenizer.model").write_bytes(stand_in_tokenizer(ModelConfig.load(model).vocab))
        unfinished = path.with_suffix(".unfinished")
        words = [source / "convert_hf_to_gguf.py", folder, "--outfile", unfinished, "--outtype", OUT_TYPES[number]]
        environment = os.environ | {"PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, capture_output=True)
        unfinished.rename(path)
    return path


def stand_in_tokenizer(vocab: int) -> bytes:
    """A SentencePiece model of so many pieces: three control pieces, then numbered ones."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    kinds = protobuf.ModelProto.SentencePiece
    for index, (piece, kind) in enumerate((("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL))):
        model.pieces.add(piece=piece, score=0.0, type=kind)
        assert model.pieces[index].piece == piece
    for index in range(3, vocab):
        model.pieces.add(piece=f"\u2581{index}", score=-float(index), type=kinds.NORMAL)
    return model.SerializeToString()
