"""The inventory of a Hugging Face checkpoint folder: which tensor lies where, checked before any is read. No torch.

A folder holds `config.json` and either `model.safetensors`, or `model.safetensors.index.json` and the shards that it
names. Every tensor of the model must be there once, in its shape, all of one dtype, and nothing else. Official folders
also carry Mistral's own copy of the weights (`consolidated*`, `params.json`) or older formats (`pytorch_model*.bin`);
beside complete safetensors they are left alone, in their place they are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.folder import OtherBytes, describe_folder, in_words, read_json, shown
from tramontane.stages.layouts import Slot, slots, tensor_name, tensor_shape
from tramontane.stages.safetensors_header import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj", "experts.w1", "experts.w2", "experts.w3")
"""How the names end of tensors that hold all experts of a layer."""
SHARD = re.compile(r"[ -.0-~]{1,200}\.safetensors")
"""A file of the folder, in printable ASCII without a slash."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder.

    A tied model's folder may carry `lm_head.weight` as well; whoever reads it checks that it equals the embedding.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    """By the name in the file."""
    slots: Mapping[Slot, str]
    """The name of the tensor at each place of the model; a tied head that is stored too is among them."""

    @classmethod
    def open(cls, model_dir: Path, config: ModelConfig) -> Checkpoint:
        """Read the headers of a folder and compare them with the model's shape.

        Raises:
            ValueError: the folder holds another set of files, or a tensor is missing, superfluous, truncated, wrongly
                shaped or of another dtype than the rest; names the file and the tensor.
        """
        listing, tensors = _read_tensors(model_dir)
        fused = next((tensor for name, tensor in tensors.items() if name.endswith(FUSED_EXPERTS)), None)
        if fused is not None:
            raise ValueError(
                f"{fused.file}: tensor {fused.name} holds all experts of a layer (fused), which is not supported; "
                f"supported: a tensor for each, {tensor_name(Slot('w1', 0, 0), EXAMPLE)} and so on"
            )
        names = {slot: tensor_name(slot, config) for slot in slots(config)}
        missing = [name for name in names.values() if name not in tensors]
        if missing:
            raise ValueError(f"{listing}: tensor {missing[0]} is missing{_and_more(missing)}")
        head = tensor_name(Slot("head"), config)
        if config.tied and head in tensors:
            names[Slot("head")] = head
        known = set(names.values())
        superfluous = [tensor for name, tensor in tensors.items() if name not in known]
        if superfluous:
            raise ValueError(
                f"{superfluous[0].file}: tensor {superfluous[0].name} is no part of a {config.architecture} of "
                f"{config.layers} layers{_and_more(superfluous)}"
            )
        dtype = tensors[names[Slot("embedding")]].dtype
        for slot, name in names.items():
            tensor, shape = tensors[name], tensor_shape(slot, config)
            if tensor.shape != shape:
                raise ValueError(f"{tensor.file}: tensor {name} has shape {tensor.shape}; config.json says {shape}")
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype}, the embedding {dtype}; all must agree"
                )
        return cls(config, tensors, names)

    @property
    def dtype(self) -> str:
        """What all the tensors are stored in: `float32` or `bfloat16`, whatever `config.json` says."""
        return self.tensors[self.slots[Slot("embedding")]].dtype

    def owned(self, span: range) -> tuple[str, ...]:
        """The tensors that a stage of these layers reads: a tied embedding belongs to the first and the last stage."""
        first, last = span.start == 0, span.stop == self.config.layers
        roles = {"embedding"} if first or (last and self.config.tied) else set()
        if last:
            roles |= {"norm", "head"}
        return tuple(
            name
            for slot, name in self.slots.items()
            if slot.role in roles or (slot.layer is not None and slot.layer in span)
        )

    def owners(self, spans: Sequence[range]) -> dict[str, tuple[int, ...]]:
        """The stages that own each tensor, given the stages' layers.

        Raises:
            ValueError: a tensor belongs to no stage or to several; names it.
        """
        owners: dict[str, tuple[int, ...]] = dict.fromkeys(self.slots.values(), ())
        for stage, span in enumerate(spans):
            for name in self.owned(span):
                owners[name] += (stage,)
        for name, stages in owners.items():
            shared = self.config.tied and name == self.slots[Slot("embedding")]
            if len(stages) != 1 and not (shared and stages in ((0,), (0, len(spans) - 1))):
                layers = ", ".join(f"{span.start}-{span.stop - 1}" for span in spans)
                owned_by = f"stages {', '.join(map(str, stages))}" if stages else "no stage"
                raise ValueError(f"tensor {name} belongs to {owned_by}; the stages' layers are {layers}")
        return owners

    def check_digests(self, digests: Mapping[str, bytes], known: Mapping[str, bytes]) -> None:
        """Compare the digests of tensors that were read with those that are known of all.

        Raises:
            OtherBytes: names the first tensor that differs, and its file.
        """
        for name, digest in digests.items():
            if known.get(name) != digest:
                raise OtherBytes(f"{self.tensors[name].file}: tensor {name} is not what the service has loaded")


def check_tokenizer_size(ids: int, config: ModelConfig, tokenizer: Path) -> None:
    """Refuse a tokenizer that can produce ids which the embedding lacks; spare rows are fine.

    Raises:
        ValueError: names the file, its ids, the embedding's tensor and its rows.
    """
    if ids > config.vocab:
        name = tensor_name(Slot("embedding"), config)
        raise ValueError(f"{tokenizer}: has {ids} ids, and the embedding has {config.vocab} rows (tensor {name})")


def _and_more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read_tensors(model_dir: Path) -> tuple[Path, dict[str, TensorInfo]]:
    """The file that lists the folder's tensors, and the tensors."""
    single, index = model_dir / SINGLE_FILE, model_dir / INDEX_FILE
    if not single.exists() and not index.exists():
        raise ValueError(f"{model_dir}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; {describe_folder(model_dir)}")
    weight_map = _read_index(index) if index.exists() else None
    files = sorted({SINGLE_FILE} if weight_map is None else set(weight_map.values()))
    if single.exists() and SINGLE_FILE not in files:
        raise ValueError(f"{model_dir}: holds both {SINGLE_FILE} and {INDEX_FILE}; one of them is left over")
    for path in sorted(model_dir.glob("*.safetensors")):
        if path.name not in files and not path.name.startswith("consolidated"):
            raise ValueError(f"{path}: no part of the checkpoint, which is {', '.join(files)}")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not (model_dir / file).exists():
            raise ValueError(f"{model_dir / file}: no such file, and {index.name} names it")
        held = read_header(model_dir / file)
        if weight_map is not None:
            _check_shard(index, weight_map, file, held)
        tensors |= held
    return (single if weight_map is None else index), tensors


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map names no tensors")
    for name, file in weight_map.items():
        # A plain name only: an index must not lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not SHARD.fullmatch(file):
            raise ValueError(
                f"{index}: tensor {in_words(name)} lies in {shown(file)}; "
                "a safetensors file of the same folder is needed"
            )
        if not name.isprintable():
            raise ValueError(f"{index}: a tensor is called {shown(name)}")
    return weight_map


def _check_shard(index: Path, weight_map: Mapping[str, str], file: str, held: Mapping[str, TensorInfo]) -> None:
    """The index and the shard name the same tensors."""
    for name, tensor in held.items():
        if weight_map.get(name) != file:
            said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
            raise ValueError(f"{tensor.file}: holds tensor {name}, which {index.name} says lies {said}")
    for name, said in weight_map.items():
        if said == file and name not in held:
            raise ValueError(f"{index.parent / file}: lacks tensor {name}, which {index.name} says lies there")
