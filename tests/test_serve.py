"""From options to a service's spec, and the refusals that come before Ray is started."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import cached_checkpoint, make_checkpoint

from tramontane.cluster.cli import ByteSize
from tramontane.cluster.planning import ServeOptions, plan_service, share_of_nodes
from tramontane.cluster.serve import serve
from tramontane.cluster.site import configured_secret
from tramontane.stages.folder import SMALL_FILES

OPTIONS = ServeOptions(
    model_dir=None,
    stages=2,
    split=None,
    name=None,
    host="127.0.0.1",
    port=50051,
    tls_cert=None,
    tls_key=None,
    client_ca=None,
    token_file=None,
    insecure=False,
    max_connection_age=3600,
    dtype=None,
    quantize=None,
    device="auto",
    kv_memory=None,
    kv_length=None,
    chunk=None,
    max_batch_tokens=1024,
    max_context=None,
    max_waiting=16,
    max_queue_wait=2.0,
    max_running=None,
    max_step=None,
    decode_groups=None,
    cpus_per_stage=None,
    threads=None,
    address=None,
    detach=False,
    hang_limit=45,
    link_silence=45,
    log_level="info",
    as_json=False,
)
TWO_CPUS = [{"CPU": 2.0}]


def test_the_embedded_model_is_the_default() -> None:
    spec = plan_service(OPTIONS, TWO_CPUS)
    assert (spec.name, spec.dtype, spec.device, spec.context) == ("embedded", "bfloat16", "cpu", 4096)
    assert spec.spans == ((0, 4), (4, 8))
    assert spec.scheduler.layout.chunk == 128
    assert (spec.cpus_per_stage, spec.threads) == (1.0, 1)
    assert spec.sampleable_ids == 1024


def test_a_gpu_for_every_stage_makes_auto_cuda() -> None:
    assert plan_service(OPTIONS, [{"CPU": 2.0, "GPU": 2.0}]).device == "cuda"
    assert plan_service(OPTIONS, [{"CPU": 2.0, "GPU": 1.0}]).device == "cpu"
    assert plan_service(OPTIONS, [{"CPU": 2.0, "GPU": 2.0}]).stage_resources() == {"GPU": 1.0}


def test_weights_of_8_bits_are_for_cpus():
    options = replace(OPTIONS, quantize="int8")
    assert plan_service(options, [{"CPU": 2.0, "GPU": 2.0}]).device == "cpu"
    with pytest.raises(ValueError, match="quantize is int8, and device is cuda"):
        plan_service(replace(options, device="cuda"), TWO_CPUS)


def test_more_stages_than_cpus_share_them() -> None:
    spec = plan_service(replace(OPTIONS, stages=8), TWO_CPUS)
    assert (spec.cpus_per_stage, spec.threads, spec.stages) == (0.25, 1, 8)


@pytest.mark.parametrize(
    ("nodes", "stages", "share"),
    [
        ([2], 1, 2.0),
        ([1, 1], 1, 1.0),  # the cluster has two, and no node has
        ([1, 1], 2, 1.0),
        ([2, 1], 2, 1.0),
        ([3, 1], 2, 1.5),
        ([4, 4, 4], 4, 2.0),
        ([1], 49, 1 / 49),
        ([0, 2], 1, 2.0),
        ([], 4, 0.25),
        ([0], 4, 0.25),
    ],
)
def test_a_stage_gets_what_one_node_can_give_it(nodes: list[float], stages: int, share: float) -> None:
    assert share_of_nodes(nodes, stages) == share


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 12))
def test_every_stage_has_room_on_some_node(nodes: list[int], stages: int) -> None:
    share = share_of_nodes(nodes, stages)
    assert sum(math.floor(count / share + 1e-9) for count in nodes) >= stages
    assert share >= max(nodes) / stages * (1 - 1e-9)


def test_a_full_context_sets_the_least_kv_memory() -> None:
    folder = cached_checkpoint("MixtralForCausalLM", sliding_window=None, max_position_embeddings=4096)
    spec = plan_service(replace(OPTIONS, model_dir=folder, stages=1), TWO_CPUS)
    assert spec.scheduler.layout.chunk == 512
    assert spec.scheduler.layout.fits(4096)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages": 9}, "stages is 9"),
        ({"split": (4, 5)}, "split is 4,5"),
        ({"split": (4, 4), "stages": 3}, "split names 2 stages, and stages is 3"),
        ({"chunk": 2048}, "chunk is 2048"),
        ({"max_context": 5000}, "max-context is 5000"),
        ({"kv_memory": 1000}, "--kv-memory is 1000"),
        ({"model_dir": Path("/nonexistent")}, "/nonexistent"),
        ({"detach": True}, "detach"),
        ({"host": "0.0.0.0"}, "host is 0.0.0.0"),
        ({"tls_cert": Path("cert.pem")}, f"--tls-cert is {Path.cwd()}/cert.pem, and --tls-key is not given"),
        ({"token_file": Path("/nonexistent")}, "--token-file is /nonexistent, which cannot be read"),
    ],
)
def test_what_is_wrong_is_named_before_ray_starts(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match="^.*" + named.replace(".", r"\.")):
        serve(replace(OPTIONS, **changes))


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, vocab_size=50)
    with pytest.raises(ValueError, match=r"tokenizer\.model: has \d+ ids, and the embedding has 50 rows"):
        plan_service(replace(OPTIONS, model_dir=folder), TWO_CPUS)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", *SMALL_FILES],
)
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, name: str, what: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "MistralForCausalLM", tokenizer=True)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / name))}: .*not a regular file$"):
        serve(replace(OPTIONS, model_dir=folder))


def test_options_that_name_no_file_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=f"--token-file is {pipe}, which cannot be read: not a regular file"):
        serve(replace(OPTIONS, token_file=pipe))
    with pytest.raises(ValueError, match=f"TRAMONTANE_SECRET_FILE is {pipe}, which cannot be read: not a regular file"):
        configured_secret({"TRAMONTANE_SECRET_FILE": str(pipe)})


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_a_host_that_there_is_not_is_said_at_once(insecure: bool, address: str | None) -> None:
    with pytest.raises(OSError, match=r"^cannot listen on no\.such\.host\.invalid:50051: "):
        serve(replace(OPTIONS, host="no.such.host.invalid", insecure=insecure, address=address))
    with pytest.raises(OSError, match=r"^cannot listen on x{300}:50051: "):
        serve(replace(OPTIONS, host="x" * 300, insecure=insecure, address=address))


def test_the_secret_of_links_comes_from_the_environment_or_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("  of the house\n")
    assert configured_secret({}) is configured_secret({"TRAMONTANE_SECRET": ""}) is None
    assert configured_secret({"TRAMONTANE_SECRET": "of the town"}) == b"of the town"
    both = {"TRAMONTANE_SECRET": "of the town", "TRAMONTANE_SECRET_FILE": str(tmp_path / "secret")}
    assert configured_secret(both) == b"of the house"
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ValueError, match=r"TRAMONTANE_SECRET_FILE is .*, which is empty"):
        configured_secret(both)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "there is no tokenizer.model: the model takes and gives token ids, no text"),
        (["tekken.json"], "there is no tokenizer.model (tekken.json: not supported): the model takes and gives"),
        (["tokenizer.model.v3", "tokenizer.json"], "no tokenizer.model (tokenizer.json, tokenizer.model.v3: not supp"),
    ],
)
def test_a_folder_that_takes_no_text_is_said_so(tmp_path: Path, files: list[str], said: str) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM")
    for name in files:
        (folder / name).write_text("{}")
    (remark,) = plan_service(replace(OPTIONS, model_dir=folder), TWO_CPUS).remarks
    assert said in remark


def test_code_of_a_model_s_own_is_said_not_to_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, auto_map={"AutoModel": "modeling.Mine"})
    remarks = plan_service(replace(OPTIONS, model_dir=folder), TWO_CPUS).remarks
    assert remarks == ("config.json names code of its own (auto_map), which is not run",)


def test_spare_rows_of_the_embedding_are_not_sampled(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, vocab_size=2000)
    assert plan_service(replace(OPTIONS, model_dir=folder), TWO_CPUS).sampleable_ids < 2000


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1048576", 2**20)]
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GiB", "5 parsecs", "-1MiB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        ByteSize().convert(text, None, None)
