"""From options to a service's spec, and the refusals that come before Ray is started."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import cached_checkpoint, make_checkpoint

from tramontane.cluster.cli import ByteSize
from tramontane.cluster.controller import ServicePhase, Status
from tramontane.cluster.following import news
from tramontane.cluster.model_folder import ModelFolder
from tramontane.cluster.node_facts import NodeFacts
from tramontane.cluster.planning import ServeOptions, plan_service, read_model, share_of_nodes
from tramontane.cluster.ray_start import check_temporary_folder
from tramontane.cluster.serve import serve
from tramontane.cluster.site import configured_secret
from tramontane.cluster.spec import ServiceSpec
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
    kernels=None,
    allow_mixed_numerics=False,
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
TWO_CPUS = [NodeFacts(name="node 10.0.0.7", cpus=2.0)]


def planned(options: ServeOptions, nodes: Sequence[NodeFacts] = TWO_CPUS) -> ServiceSpec:
    return plan_service(options, read_model(options), nodes)


def test_the_embedded_model_is_the_default() -> None:
    spec = planned(OPTIONS)
    assert (spec.name, spec.dtype, spec.device, spec.context) == ("embedded", "bfloat16", "cpu", 4096)
    assert spec.spans == ((0, 4), (4, 8))
    assert spec.scheduler.layout.chunk == 128
    assert (spec.cpus_per_stage, spec.threads) == (1.0, 1)
    assert spec.sampleable_ids == 1024


def test_a_gpu_for_every_stage_makes_auto_cuda() -> None:
    assert planned(OPTIONS, [NodeFacts(name="n", cpus=2.0, gpus=2.0)]).device == "cuda"
    assert planned(OPTIONS, [NodeFacts(name="n", cpus=2.0, gpus=1.0)]).device == "cpu"
    assert planned(OPTIONS, [NodeFacts(name="n", cpus=2.0, gpus=2.0)]).stage_resources() == {"GPU": 1.0}


def test_weights_of_8_bits_are_for_cpus():
    options = replace(OPTIONS, quantize="int8")
    assert planned(options, [NodeFacts(name="n", cpus=2.0, gpus=2.0)]).device == "cpu"
    with pytest.raises(ValueError, match="quantize is int8, and device is cuda"):
        planned(replace(options, device="cuda"))


def test_more_stages_than_cpus_share_them() -> None:
    spec = planned(replace(OPTIONS, stages=8))
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
    spec = planned(replace(OPTIONS, model_dir=folder, stages=1))
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
        (
            {"max_context": 4096, "kv_memory": 10**15},
            "--kv-memory is 1000000000000000 bytes a stage, and that does not",
        ),
        ({"model_dir": Path("mistralai/Mistral-7B-v0.1")}, "mistralai/Mistral-7B-v0.1: no such folder, and nothing is"),
    ],
)
def test_what_is_wrong_is_named_before_ray_starts(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match="^.*" + named.replace(".", r"\.")):
        serve(replace(OPTIONS, **changes))


def test_a_gpu_that_is_asked_for_and_not_there_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"^--device is cuda, and this machine has 0 GPUs that CUDA programs see"):
        serve(replace(OPTIONS, device="cuda", port=0))
    # A cluster may get one yet.
    assert planned(replace(OPTIONS, device="cuda", address="10.0.0.7:6379")).device == "cuda"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_sockets_is_named(variable: str) -> None:
    most = 107 - len("/ray/session_2026-11-28_17-30-00_000000_4194304/sockets/plasma_store")
    check_temporary_folder({variable: "/" + "x" * (most - 1)})
    with pytest.raises(ValueError, match=f"^{variable} is /x+, which has {most + 1} bytes; {most} are the limit"):
        check_temporary_folder({variable: "/" + "x" * most})
    check_temporary_folder({"TMPDIR": "x" * 100, "RAY_TMPDIR": "/short"})
    check_temporary_folder({})


LONG = {"head_dim": 64, "sliding_window": None, "max_position_embeddings": 1_024_000}


def test_a_context_that_does_not_fit_is_lowered_and_ready_and_the_model_say_so() -> None:
    folder = cached_checkpoint("MistralForCausalLM", **LONG)
    small = NodeFacts(name="node 10.0.0.7", cpus=2.0, free_memory=2**30)
    options = replace(OPTIONS, model_dir=folder, stages=1)
    spec = planned(options, [small])
    assert 100_000 < spec.context < 1_024_000
    assert spec.scheduler.layout.fits(spec.context)
    assert "of 1.0 GiB on node 10.0.0.7: weights" in spec.memory_sum
    assert ServiceSpec.decode(spec.encode()) == spec

    status = Status(phase=ServicePhase.READY, detail="", fraction=1.0, port=7, version="v")
    event, line, facts = news(status, spec)
    assert (event, facts["context_tokens"]) == ("ready", spec.context)
    assert line == f"ready: {folder.name} on 127.0.0.1:7 (context lowered to {spec.context:,} tokens, which fit)"
    info = ModelFolder(spec, part="gateway-0", node="n").served_model("v", True).info(reason="")
    assert (info.context_tokens, info.checkpoint_context_tokens) == (spec.context, 1_024_000)
    assert info.context_lowered == spec.context_lowered

    with pytest.raises(ValueError, match=r"^--max-context is 1024000, and one sequence of so many tokens does not fit"):
        planned(replace(options, max_context=1_024_000), [small])
    whole = planned(options, [replace(small, free_memory=10**12)])
    assert (whole.context, whole.context_lowered) == (1_024_000, "")
    assert news(status, whole)[1] == f"ready: {folder.name} on 127.0.0.1:7"


def test_a_gpu_has_its_own_memory() -> None:
    folder = cached_checkpoint("MistralForCausalLM", **LONG)
    node = NodeFacts(name="this machine", cpus=2.0, gpus=1.0, free_memory=0, free_gpu_memory=(2**31,))
    spec = planned(replace(OPTIONS, model_dir=folder, stages=1), [node])
    assert (spec.device, spec.context < 1_024_000) == ("cuda", True)
    assert "on GPU 0 of this machine" in spec.memory_sum


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, vocab_size=50)
    with pytest.raises(ValueError, match=r"tokenizer\.model: has \d+ ids, and the embedding has 50 rows"):
        planned(replace(OPTIONS, model_dir=folder))


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
    (remark,) = read_model(replace(OPTIONS, model_dir=folder)).remarks
    assert said in remark


def test_code_of_a_model_s_own_is_said_not_to_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, auto_map={"AutoModel": "modeling.Mine"})
    remarks = read_model(replace(OPTIONS, model_dir=folder)).remarks
    assert remarks == ("config.json names code of its own (auto_map), which is not run",)


def test_spare_rows_of_the_embedding_are_not_sampled(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", tokenizer=True, vocab_size=2000)
    assert planned(replace(OPTIONS, model_dir=folder)).sampleable_ids < 2000


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1048576", 2**20)]
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GiB", "5 parsecs", "-1MiB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        ByteSize().convert(text, None, None)


@pytest.mark.parametrize("text", ["20000000000GiB", "9" * 30, "9" * 400])
def test_a_size_beyond_any_machine_is_said(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is more than any machine has"):
        ByteSize().convert(text, None, None)
