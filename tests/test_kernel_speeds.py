"""How variants are compared on a machine: every matrix, the slowest is 1, and a CPU is probed once."""

import json
from dataclasses import replace

import pytest
from kernel_sets import FACTS, needs_native

from tramontane.cluster.kernel_agreement import probe_in_child
from tramontane.stages.config import EXAMPLE
from tramontane.stages.kernels.native import speeds
from tramontane.stages.variants import MATRICES

pytestmark = needs_native


@pytest.fixture(autouse=True)
def _a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.setattr(speeds, "MODEL", replace(EXAMPLE, windows=(None,), context=64))
    monkeypatch.setattr(speeds, "DECODE_ROWS", (1, 3))
    monkeypatch.setattr(speeds, "CHUNK_ROWS", 9)
    monkeypatch.setattr(speeds, "_kept_in", lambda what: tmp_path / f"{abs(hash(what))}.json")


@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_every_variant_in_every_matrix(dtype, quantize):
    names = FACTS.variants(f"{dtype}-{quantize}" if quantize else dtype)
    found = speeds.measure(dtype, quantize, names, rounds=1)
    assert set(found) == set(MATRICES)
    for of_matrix in found.values():
        assert tuple(of_matrix) == names
        assert min(of_matrix.values()) == 1.0


def test_a_cpu_is_probed_once(monkeypatch):
    first = speeds.probe("float32", None)
    assert tuple(first) == FACTS.variants("float32")
    monkeypatch.delattr(speeds, "measure")
    assert speeds.probe("float32", None) == first


async def test_a_probe_that_fails_says_why(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "a traceback" >&2; echo "no $3 $4" >&2; exit 1\n')
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(ValueError, match=r"^no float32 int8$"):
        await probe_in_child(["float32", "int8"])


def test_the_probe_as_a_program(monkeypatch, capsys):
    speeds.main(["float32"])
    assert json.loads(capsys.readouterr().out).keys() == set(FACTS.variants("float32"))
