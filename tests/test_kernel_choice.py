"""The choice of kernels from facts about nodes: by table, probe or order, and what the operator is told."""

import json
from dataclasses import replace

import pytest

from tramontane.stages import cpu
from tramontane.stages.cpu import Cpu, this_cpu
from tramontane.stages.kernel_choice import TABLE, NodeKernels, choose_variants, decide, probed_speeds, table_speeds
from tramontane.stages.variants import DEVICES, MATRICES, VARIANTS, Variants, check_requested


def cpu_of(variant, model="Maker 1-1"):
    """A CPU that runs this variant and those after it."""
    (needs,) = (each.needs for each in VARIANTS if each.name == variant)
    return Cpu(model, f"CPU {model}", needs | {"avx2", "fma", "sse4_2"})


def node(name, variant="avx512bf16", model="Maker 1-1", obstacle=""):
    return NodeKernels(name, cpu_of(variant, model), obstacle)


def alike(**speeds):
    return dict.fromkeys(MATRICES, speeds)


def chosen(nodes, numbers="bfloat16", requested=None, speeds=None, **options):
    decision = decide(nodes, numbers, requested, lambda cpu: (speeds or {}).get(cpu.model), **options)
    return [str(choice) for choice in decision.stages], list(decision.remarks)


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ("bfloat16", ["amx", "avx512bf16", "avx512", "avx2"]),
        ("bfloat16-int8", ["avx512bf16", "avx512", "avx2"]),
        ("float32", ["avx512", "avx2"]),
        ("float32-int8", ["avx512", "avx2"]),
    ],
)
def test_variants_that_compute_other_bits_by_order(numbers, names):
    assert list(node("n", "amx").variants(numbers)) == names
    assert list(node("n", "avx2").variants(numbers)) == ["avx2"]
    assert node("n", "amx", obstacle="no").variants(numbers) == ()


def test_without_speeds_the_order_decides():
    assert chosen([node("n", "amx")]) == (["native amx"], [])
    assert chosen([node("n")]) == (["native avx512bf16"], [])
    assert chosen([node("n", "avx512")]) == (["native avx512"], [])


def test_what_a_cpu_really_does_decides():
    slow_dot = {"Maker 1-1": alike(avx512bf16=1.0, avx512=1.7, avx2=1.0)}
    assert chosen([node("n")], speeds=slow_dot) == (["native avx512"], [])
    assert chosen([node("n", model="Maker 1-2")], speeds=slow_dot) == (["native avx512bf16"], [])


def test_a_variant_that_was_never_measured_is_not_chosen_by_a_row_that_knows_others():
    assert chosen([node("n", "amx")], speeds={"Maker 1-1": alike(avx512=1.5, avx2=1.0)}) == (["native avx512"], [])


def test_matrices_differ_where_it_is_worth_it():
    speeds = {
        "attention": {"avx512bf16": 1.2, "avx512": 1.0},
        "experts": {"avx512bf16": 1.0, "avx512": 1.5},
        "head": {"avx512bf16": 1.09, "avx512": 1.0},
    }
    mixed = choose_variants(["avx512bf16", "avx512"], [speeds])
    assert mixed == Variants(attention="avx512bf16", experts="avx512", head="avx512")
    assert choose_variants(["avx512bf16", "avx512"], [speeds, speeds]) == Variants.alike("avx512")


def test_nodes_that_differ_take_what_is_worth_most_where_it_is_worth_least():
    """One node is 1.9 times as fast with one variant, the other node 1.5 times as fast with the other."""
    speeds = {"M 1": alike(avx512bf16=1.0, avx512=1.9), "M 2": alike(avx512bf16=1.5, avx512=1.0)}
    nodes = [node("a", model="M 1"), node("b", model="M 2"), node("c", model="M 2")]
    assert chosen(nodes, speeds=speeds) == (["native avx512"] * 3, [])
    assert chosen(nodes[1:], speeds=speeds) == (["native avx512bf16"] * 2, [])
    assert chosen([*nodes[1:], node("d", model="M 3")], speeds=speeds)[0] == ["native avx512bf16"] * 3


def test_the_best_in_common_and_whose_fault_it_is():
    kernels, remarks = chosen([node("a", "amx"), node("b", "avx512"), node("c", "amx")])
    assert kernels == ["native avx512"] * 3
    assert remarks == [
        "b: its CPU (CPU Maker 1-1) has no amx_bf16, amx_tile, avx512_bf16, so that no stage uses amx, but avx512"
    ]


@pytest.mark.parametrize("requested", [None, "native", "avx512"])
def test_a_node_that_runs_none_is_named_and_the_start_refused(requested):
    nodes = [node("a"), node("b", obstacle="there is no C++ compiler (g++)"), node("c")]
    expected = "no native kernels run on the nodes of all stages: b: there is no C.. compiler .* --allow-mixed-numerics"
    with pytest.raises(ValueError, match=expected):
        chosen(nodes, requested=requested)
    kernels, remarks = chosen(nodes, requested=requested, allow_mixed=True)
    native = "native avx512" if requested == "avx512" else "native avx512bf16"
    assert kernels == [native, "cpu", native]
    assert remarks == ["stages round differently: b: there is no C++ compiler (g++)"]
    with pytest.raises(ValueError, match=r"8-bit weights need native kernels .*: b: there is no"):
        chosen(nodes, numbers="bfloat16-int8", allow_mixed=True)


def test_a_variant_by_name_must_run_everywhere():
    nodes = [node("a", "avx512"), node("b", "avx2")]
    assert chosen(nodes, requested="avx2") == (["native avx2"] * 2, [])
    with pytest.raises(ValueError, match=r"b: its CPU \(CPU Maker 1-1\) has no avx512_vnni, avx512bw"):
        chosen(nodes, requested="avx512")
    assert chosen(nodes, requested="avx512", allow_mixed=True)[0] == ["native avx512", "native avx2"]
    with pytest.raises(ValueError, match="kernels is 'amx'; numbers of float32 have avx512, avx2"):
        chosen(nodes, numbers="float32", requested="amx")


def test_where_no_node_has_native_kernels_torch_serves_unless_they_were_asked_for():
    nodes = [node("a", obstacle="there is no C++ compiler (g++)")] * 2
    remark = "no native kernels, torch's packed products instead: a: there is no C++ compiler (g++)"
    assert chosen(nodes) == (["cpu", "cpu"], [remark])
    for options in ({"requested": "native"}, {"requested": "avx2"}, {"numbers": "bfloat16-int8"}):
        with pytest.raises(ValueError, match="the native kernels, which were asked for, are not there: a: there is no"):
            chosen(nodes, **options)
    assert chosen(nodes, requested="cpu") == (["cpu", "cpu"], [])


def test_a_probe_needs_a_margin():
    assert probed_speeds({"avx512bf16": 1.0, "avx512": 1.19, "avx2": 0.5}) is None
    assert probed_speeds({"avx512bf16": 1.0, "avx512": 1.2, "avx2": 0.5}) == alike(avx512bf16=1.0, avx512=1.2, avx2=0.5)
    assert probed_speeds({"avx512": 1.0}) is None


@pytest.mark.parametrize(
    ("requested", "device", "quantize", "message"),
    [
        ("fast", "cpu", None, "kernels is 'fast'; supported: native, cpu, cuda, reference, amx, avx512bf16"),
        ("avx2", "cuda", None, "kernels is 'avx2', and device is 'cuda'; these kernels run on 'cpu' only"),
        ("cuda", "cpu", None, "kernels is 'cuda', and device is 'cpu'"),
        ("cpu", "cpu", "int8", "quantize is 'int8', and kernels is 'cpu'; only 'native' quantizes"),
        (None, "cpu", "int4", "quantize is 'int4'; supported: int8"),
    ],
)
def test_what_no_machine_can_do_is_refused(requested, device, quantize, message):
    with pytest.raises(ValueError, match=message):
        check_requested(requested, device=device, quantize=quantize)


def test_what_can_be_wished_for():
    for requested in (None, *DEVICES, *(each.name for each in VARIANTS)):
        check_requested(requested, device="cuda" if requested == "cuda" else "cpu", quantize=None)


def test_the_table_is_well_formed():
    """Each row is for one CPU, and has every variant for every matrix and kind of numbers."""
    rows = json.loads(TABLE.read_text())
    assert len({row["cpu"] for row in rows}) == len(rows) > 0
    for row in rows:
        assert row.keys() == {"cpu", "name", "measured", "speeds"}
        for numbers, speeds in row["speeds"].items():
            fitting = [each.name for each in VARIANTS if numbers in each.numbers]
            assert speeds.keys() == set(MATRICES)
            assert len({tuple(of) for of in speeds.values()}) == 1
            for of_matrix in speeds.values():
                assert list(of_matrix) == fitting[len(fitting) - len(of_matrix) :]
                assert min(of_matrix.values()) == 1.0


def test_a_cpu_that_is_not_in_the_table():
    assert table_speeds(Cpu("", "told nothing", frozenset()), "bfloat16") is None


def test_the_first_cpu_of_the_system_counts(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9\n"
        "flags\t\t: fpu avx2 amx_tile amx_bf16\n\nprocessor\t: 1\nmodel\t\t: 3\n"
    )
    monkeypatch.setattr(cpu, "Path", lambda _: path)
    monkeypatch.setattr(cpu, "_may_use_tiles", lambda: True)
    expected = Cpu("AuthenticAMD 26-2", "AMD EPYC 9", frozenset({"fpu", "avx2", "amx_tile", "amx_bf16"}))
    assert this_cpu() == expected
    monkeypatch.setattr(cpu, "_may_use_tiles", lambda: False)
    assert this_cpu() == replace(expected, flags=frozenset({"fpu", "avx2"})), "tiles that the system does not lend"
    path.unlink()
    assert this_cpu().flags == frozenset()
