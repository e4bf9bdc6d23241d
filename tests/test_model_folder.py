"""What parts read of the model's folder, and what they say when it is not what the service has loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from models import cached_checkpoint, tiny_tokenizer
from plans import planned

from tramontane.cluster.model_folder import ModelFolder
from tramontane.cluster.spec import Loaded, ServiceSpec
from tramontane.stages.folder import OtherBytes


@pytest.fixture
def spec(tmp_path: Path) -> ServiceSpec:
    """As `serve` plans it without options, of a folder that may be written to."""
    folder = shutil.copytree(cached_checkpoint("MixtralForCausalLM", tokenizer=True), tmp_path / "model")
    return planned(folder)


def on_some_node(spec: ServiceSpec, part: str = "gateway-0") -> ModelFolder:
    return ModelFolder(spec, part=part, node="10.0.0.2 (5f)")


def test_an_unchanged_folder_is_used(spec):
    model = on_some_node(spec).served_model("v", True)
    assert (model.version, model.row_invariant, model.context) == ("v", True, spec.context)
    assert model.tokenizer is not None
    quantized = on_some_node(replace(spec, quantize="int8")).served_model("v", True)
    assert (model.quantization, quantized.quantization) == ("", "int8")
    assert on_some_node(spec).config() == model.config


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.model"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_another_file_is_named_with_part_and_node(spec, name, how):
    path = spec.path / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(OtherBytes) as refusal:
        on_some_node(spec).served_model("v", True)
    said = f"gateway-0 on node 10.0.0.2 (5f) does not join: {path}: not the file that the service has loaded"
    assert str(refusal.value) == said


def test_a_file_that_was_not_there_is_another(spec):
    (spec.path / "tokenizer.model").unlink()
    bare = planned(spec.model_dir)
    (spec.path / "tokenizer.model").write_bytes(tiny_tokenizer())
    with pytest.raises(OtherBytes, match="tokenizer"):
        on_some_node(bare).served_model("v", True)


def test_a_stage_needs_no_tokenizer(spec):
    """It may lie on a node that has none."""
    (spec.path / "tokenizer.model").unlink()
    assert on_some_node(spec, "stage-0.1").config().layers == 3
    (spec.path / "config.json").unlink()
    with pytest.raises(OtherBytes, match=r"stage-0\.1 on node .*config\.json"):
        on_some_node(spec, "stage-0.1").config()


def test_other_tensors_than_were_loaded_are_named_with_their_file(spec):
    folder, name = on_some_node(spec, "stage-0.0"), "model.norm.weight"
    config = folder.config()
    folder.check_tensors(config, {name: b"anything"})  # nothing is served yet
    loaded = Loaded(version="v", row_invariant=True, tensors={name: b"one", "lm_head.weight": b"two"})
    folder = on_some_node(replace(spec, loaded=loaded), "stage-0.0")
    folder.check_tensors(config, {name: b"one"})
    with pytest.raises(OtherBytes) as refusal:
        folder.check_tensors(config, {name: b"other"})
    assert f"{spec.path}/model.safetensors: tensor {name} is not what the service has loaded" in str(refusal.value)
    assert str(refusal.value).startswith("stage-0.0 on node 10.0.0.2 (5f) does not join: ")
