"""Reading small files of a checkpoint, token files or certificates never ends in a traceback, whatever they hold.

Each is read, or refused by one line that names the file. Bytes are random, or a right file with a piece of it replaced,
or JSON of the right keys with any values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from certificates import Authority
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import cached_checkpoint
from plans import planned

from tramontane.client.connecting import connects
from tramontane.cluster.site import configured_secret
from tramontane.cluster.tls import read_identity
from tramontane.cluster.tokens import read_tokens

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
RIGHT = {
    "generation_config.json": {"eos_token_id": [2], "pad_token_id": -1},
    "added_tokens.json": {"<|im_end|>": 5},
    "tokenizer.json": {"added_tokens": [{"id": 4, "content": "x", "special": True}], "model": {"vocab": {"a": 5}}},
    "tokenizer_config.json": {"added_tokens_decoder": {"4": {"content": "x"}}, "eos_token": {"content": "</s>"}},
}
"""What lies beside config.json, the weights, their index and tokenizer.model."""
KEYS = {
    "config.json": ["architectures", "model_type", "layer_types", "rope_parameters", "rope_scaling", "rope_theta"],
    "generation_config.json": ["eos_token_id", "bos_token_id"],
    "added_tokens.json": ["<s>", "\ud800", "two\nlines"],
    "tokenizer.json": ["id", "content", "special", "vocab"],
    "tokenizer_config.json": ["4", "content", "special", "additional_special_tokens", "eos_token"],
    INDEX: ["weight_map", "model.norm.weight", "\ud800"],
    SINGLE: ["__metadata__", "model.norm.weight", "dtype", "shape", "data_offsets", "two\nlines"],
}
ODD = [10**400, -1, 0, 1, 2.5, float("nan"), float("inf"), "", "\ud800", "two\nlines", "a\0b", "F32", "x.safetensors"]
ODD += [325, "two\nlines.safetensors", "x" * 300 + ".safetensors", ["F32"]]
odd_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(ODD) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right checkpoint folder with every file that is read."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(cached_checkpoint("MixtralForCausalLM", tokenizer=True, vocab_size=330), folder)
    tensors = header_of((folder / SINGLE).read_bytes()).keys() - {"__metadata__"}
    for name, values in {**RIGHT, INDEX: {"weight_map": dict.fromkeys(tensors, SINGLE)}}.items():
        (folder / name).write_text(json.dumps(values))
    assert planned(folder).sampleable_ids > 300
    return folder


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@st.composite
def contents(draw: st.DrawFn, name: str, right: bytes) -> bytes:
    """What might lie where a file should."""
    kind = draw(st.sampled_from(["random", "damaged", "damaged", "values", "values", "values"]))
    if kind == "values" and (name.endswith(".json") or name == SINGLE):
        values = header_of(right) if name == SINGLE else json.loads(right)
        for _ in range(draw(st.integers(1, 3))):
            spoil(draw, values, KEYS.get(name, []))
        return with_header(values) if name == SINGLE else json.dumps(values).encode()
    piece = draw(st.binary(max_size=40))
    if kind == "random":
        return piece
    start = draw(st.integers(0, min(len(right), 4000)))
    return right[:start] + piece + right[start + draw(st.integers(0, 40)) :]


def spoil(draw: st.DrawFn, values: dict, keys: list[str]) -> None:
    """Put something odd somewhere in an object."""
    while True:
        known = sorted(values)[:40] if values and draw(st.booleans()) else keys
        key = draw(st.sampled_from(known or ["x"]))
        inside = values.get(key)
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            inside = inside[0]
        if not isinstance(inside, dict) or draw(st.booleans()):
            values[key] = draw(odd_values)
            return
        values = inside


def is_read_or_refused(read: Callable[[], object], path: Path) -> None:
    try:
        read()
    except ValueError as error:
        line = str(error)
        assert line.isprintable(), f"{line!r} is no line for a terminal"
        assert len(line) < 2000
        assert str(path.parent) in line


@pytest.mark.parametrize("name", ["config.json", *RIGHT, INDEX, SINGLE, "tokenizer.model"])
def test_a_checkpoints_small_files(folder: Path, name: str) -> None:
    right = (folder / name).read_bytes()
    most = 40 if name == "tokenizer.model" else 100

    @settings(deadline=None, max_examples=most, suppress_health_check=list(HealthCheck), database=None)
    @given(contents(name, right))
    @example(b"")
    @example(b"\xef\xbb\xbf{}")
    @example(b"[" * 100_000)
    @example(b'{"eos_token": "\\ud800"}')
    @example(b'{"\\ud800": 325}')
    @example(b'{"architectures": ["MixtralForCausalLM"], "rms_norm_eps": 1' + b"0" * 400 + b"}")
    @example(b'{"weight_map": {"x": "model.safetensors", "y": "' + b"a" * 300 + b'.safetensors"}}')
    @example(b'{"x": ' + b"9" * 5000 + b"}")
    @example(b"version https://git-lfs.github.com/spec/v1\n")
    def reads(content: bytes) -> None:
        (folder / name).write_bytes(content)
        is_read_or_refused(lambda: planned(folder), folder / name)

    try:
        reads()
    finally:
        (folder / name).write_bytes(right)


@click.command()
@connects
def verb(_client: object) -> None:
    """Stands for any verb of the client."""


tokens = st.lists(st.sampled_from([b"a" * 20, b"#", b"\n", b"\r", b"\0", b"\xff", b" ", "\u2028".encode()]), max_size=8)


@settings(deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80) | tokens.map(b"".join))
def test_token_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Token files of the server, of its links and of the client."""
    path = tmp_path_factory.getbasetemp() / "tokens"
    path.write_bytes(content)
    is_read_or_refused(lambda: read_tokens(str(path)), path)
    is_read_or_refused(lambda: configured_secret({"TRAMONTANE_SECRET_FILE": str(path)}), path)
    done = CliRunner().invoke(verb, ["--token-file", str(path)])
    assert done.exception is None or isinstance(done.exception, SystemExit), content
    assert done.output.count("\n") <= 1


@pytest.mark.parametrize("name", ["cert", "key", "client_ca"])
def test_certificates(tmp_path: Path, name: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    paths = {"cert": cert, "key": key, "client_ca": authority.ca}
    right = paths[name].read_bytes()

    @settings(deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck))
    @given(contents("pem", right))
    @example(b"")
    @example(right * 2)
    @example(right.replace(b"\n", b"\r\n"))
    @example(b"\0" + right)
    def reads(content: bytes) -> None:
        paths[name].write_bytes(content)
        is_read_or_refused(lambda: read_identity(*map(str, paths.values())), paths[name])

    reads()
