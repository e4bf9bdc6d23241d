"""The bench of models: arithmetic by hand, workloads, figures, and one quick run of what is in process."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import limits, pipeline_tax, report, workloads
from bench.contestants import Failed, Job, Turn, known_contestants, run_program
from bench.kernel_bench import Part, decode_steps
from bench.limits import Ceilings, Cost, decode_cost, experts_touched, floor, keys_seen, parameters, prefill_cost
from bench.llama_file import stand_in_tokenizer
from bench.pipeline_tax import Replay, best_split
from bench.results import Results, Round
from bench.served import Usage
from bench.synthetic import MODELS, SHARED, make_model
from bench.workloads import FULL, QUICK, Workload, make_workloads
from sentencepiece import SentencePieceProcessor

from tramontane.stages.config import EXAMPLE, ModelConfig

BENCH = Path(__file__).parent / "bench" / "bench_model.py"
MACHINE = Ceilings(read_gb_s=40, float32_gflop_s=400, bfloat16_gflop_s=800)
MID = ModelConfig.from_hf(MODELS["mid"] | SHARED)


@pytest.mark.parametrize("module", [limits, pipeline_tax, report, workloads], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_the_real_numbers_of_the_docstring():
    assert parameters(MID) == 489_243_648
    one = decode_cost(MID, [191], "bfloat16")
    assert one.bytes == 2 * 154_468_352 + 192 * 8192
    assert one.seconds(MACHINE, "bfloat16") == pytest.approx(7.76e-3, rel=1e-3)
    assert one.bound(MACHINE, "bfloat16") == "reads"
    long = prefill_cost(MID, [4096], "bfloat16")
    assert long.operations == 2 * 121_700_352 * 4096 + 32_768 * 8_390_656 + 2 * 32_768_000
    assert long.seconds(MACHINE, "bfloat16") == pytest.approx(1.59, rel=1e-3)


@pytest.mark.parametrize(("rows", "touched"), [(1, 2.0), (8, 7.199), (32, 7.999)])
def test_experts_touched(rows, touched):
    assert experts_touched(MID, rows) == pytest.approx(touched, abs=1e-3)


def test_a_dense_model_touches_its_one_ffn():
    dense = ModelConfig.from_hf(MODELS["mid-dense"] | SHARED)
    assert experts_touched(dense, 5) == 1
    assert decode_cost(dense, [0], "float32").bytes == 4 * (8 * (2_621_440 + 6_291_456) + 32_768_000) + 16_384


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 20), (5, 9), (7, 1), (8, 4), (30, 3)])
def test_keys_seen_by_counting(first, rows):
    counted = sum(min(position + 1, 8) for position in range(first, first + rows))
    assert keys_seen(EXAMPLE, first, rows) == 4 * counted


def test_counted_experts_replace_the_expected():
    fewer, expected = (decode_cost(MID, [9] * 32, "bfloat16", experts).bytes for experts in (4.0, None))
    assert expected - fewer == pytest.approx((7.9992 - 4) * 8 * 6_291_456 * 2, rel=1e-4)


def test_many_rows_are_bound_by_arithmetic_where_that_is_slow():
    slow = Ceilings(read_gb_s=40, float32_gflop_s=100, bfloat16_gflop_s=10)
    cost = decode_cost(MID, [100] * 32, "bfloat16")
    assert cost.bound(slow, "bfloat16") == "arithmetic"
    assert cost.seconds(slow, "bfloat16") == pytest.approx(cost.operations / 100e9)  # float32 is quicker here


def test_a_floor_is_prefill_and_one_step_less_than_new_tokens():
    least = floor(MID, [128], 3, MACHINE, "bfloat16")
    steps = [decode_cost(MID, [position], "bfloat16").bytes / 40e9 for position in (128, 129)]
    assert least.decode_s == pytest.approx(sum(steps))
    assert least.tokens_per_s("whole", 3) == pytest.approx(3 / (least.prefill_s + least.decode_s))


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_workloads_are_the_same_each_time():
    first, again = make_workloads(32_000), make_workloads(32_000)
    assert first == again
    assert [len(first[name].prompts) for name in "ABCD"] == [32, 1, 1, 8]
    assert 32 <= min(first["A"].lengths) < max(first["A"].lengths) <= 512
    assert sum(first["A"].lengths) == 9236, "another draw makes figures of different days differ"
    assert first["C"].lengths == (FULL.long,)


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_ids_are_of_the_vocabulary_and_no_control_tokens(sizes):
    ids = [token for workload in make_workloads(100, sizes).values() for prompt in workload.prompts for token in prompt]
    assert (min(ids), max(ids)) == (3, 99)


def test_a_workload_travels_as_json():
    workload = make_workloads(100, QUICK)["A"]
    assert Workload.from_json(json.loads(json.dumps(workload.as_json()))) == workload


def test_the_best_split_leaves_the_head_room():
    # A layer takes 1 s and the head 2 s: 5 + 3 is even, 4 + 4 was not.
    assert best_split((4, 4), (4.0, 6.0)) == pipeline_tax.SplitBound((5, 3), (1.0, 1.0))
    assert best_split((4, 4), (4.0, 4.0)).mean == 1.0


def made_results(*rounds: tuple[float, float]) -> Results:
    """Rounds of (seconds of ours, seconds of hf) for 6 generated tokens; a quicker machine in later rounds."""
    workload = Workload("A", ((5, 6), (7, 8)), 3, "whole")

    def turn(seconds: float) -> Turn:
        return Turn("about", {"A": {"wall_s": seconds, "first_s": 0.1, "tokens": [[1, 2, 3], [4, 5, 6]]}})

    made = [
        Round(
            Ceilings(read_gb_s=10 * index, float32_gflop_s=1, bfloat16_gflop_s=1),
            Ceilings(read_gb_s=30 * index, float32_gflop_s=1, bfloat16_gflop_s=1),
            {"ours": turn(ours), "hf": turn(theirs)},
        )
        for index, (ours, theirs) in enumerate(rounds, 1)
    ]
    return Results(EXAMPLE, "float32", (workload,), made)


def test_figures_are_medians_and_ratios_are_taken_in_a_round():
    results = made_results((1.0, 2.0), (3.0, 3.0), (2.0, 8.0))
    figure = results.figure(results.workloads[0], "hf")
    assert figure is not None
    assert figure.tokens_per_s == (3.0, 2.0, 0.75)
    assert (figure.median, figure.of_ours, figure.same_first) == (2.0, 0.5, 1.0)
    assert results.rounds[0].ceilings.read_gb_s == 20
    assert results.figure(results.workloads[0], "vllm") is None


def test_the_table_has_each_contestant_beside_the_limit():
    lines = list(report.workload_table(made_results((1.0, 2.0)), {"ours": "ours, in process", "hf": "transformers"}))
    assert lines[3].split()[0] == "limit"
    assert lines[4].split()[3:5] == ["6.0", "6.0..6.0"]
    assert lines[5].split()[:3] == ["transformers", "3.0", "3.0..3.0"]


def test_the_two_stages_ratio():
    results = made_results((1.0, 2.0))
    results.rounds[0].replay = Replay((2, 2), (0.9, 0.6))
    run = {"wall_s": 1.0, "first_s": 0.1, "tokens": [[1], [2]], "busy": {"0.0": 0.9, "0.1": 0.6}}
    results.rounds[0].turns["grpc2"] = Turn("about", {"A": run})
    found = results.pipeline("A", "grpc2")
    assert found is not None
    assert found.of_floor == 0.9
    assert found.of_bound == pytest.approx(0.75 / found.bound.mean)
    whole, busy = list(report.pipeline_lines("A", found))[1:]
    assert whole.endswith("90% of their rate")
    assert "busy 90%, 60%" in busy


def test_cores_are_medians_of_who_used_them():
    results = made_results((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    for each, stages in zip(results.rounds, (1.5, 1.9, 1.7), strict=True):
        each.turns["ours"].runs["A"]["cores"] = {"stages": stages, "others": 0.2, "client": 0.1}
    lines = list(report.cores_lines(results, {"ours": "ours", "hf": "transformers"}, "A"))
    assert lines == ["cores of ours, A: stages 1.70, others 0.20, client 0.10"]


def test_cores_are_seconds_used_by_the_second():
    before, after = Usage(stages=1.0, others=0.5, client=0.0), Usage(stages=4.0, others=1.0, client=0.25)
    assert after.cores(before, 2.0) == {"stages": 1.5, "others": 0.25, "client": 0.125}


def test_json_has_every_figure_and_no_tokens():
    line = json.loads(report.as_json({"model": "tiny"}, made_results((1.0, 2.0))))
    assert [figure["contestant"] for figure in line["figures"]] == ["ours", "hf"]
    assert "tokens" not in line["rounds"][0]["turns"]["hf"]["runs"]["A"]


def test_a_contestant_that_breaks_says_why(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no such library')")
    job = Job(
        model=tmp_path,
        dtype="float32",
        quantize=None,
        device="cpu",
        threads=1,
        context=64,
        warm_up=workloads.make_warm_up(100),
        workloads=(),
    )
    with pytest.raises(Failed, match="no such library"):
        run_program(sys.executable, script, job)
    with pytest.raises(Failed, match="No such file"):
        run_program(tmp_path / "no-python", script, job)


def test_the_stand_in_tokenizer_has_a_piece_for_every_id():
    processor = SentencePieceProcessor(model_proto=stand_in_tokenizer(1000))
    assert (processor.vocab_size(), processor.bos_id(), processor.eos_id(), processor.unk_id()) == (1000, 1, 2, 0)


def test_transformers_computes_the_same_model(tmp_path):
    job = Job(
        model=make_model("tiny", tmp_path),
        dtype="float32",
        quantize=None,
        device="cpu",
        threads=1,
        context=1024,
        warm_up=workloads.make_warm_up(1000),
        workloads=(make_workloads(1000, QUICK)["D"],),
    )
    chosen = [each for each in known_contestants({}) if each.name in ("ours", "hf")]
    ours, hf = (contestant.take_turn(job).runs["D"]["tokens"] for contestant in chosen)
    assert ours == hf


def test_a_quick_run_in_process(tmp_path):
    words = ["--quick", "--only", "ours", "--models", str(tmp_path)]
    done = subprocess.run([sys.executable, str(BENCH), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert [(figure["workload"], figure["contestant"]) for figure in line["figures"]] == [
        (name, "ours") for name in "ABCD"
    ]
    assert all(figure["median"] > 0 for figure in line["figures"])
    assert line["experts_touched"]["B"] == 2
    assert 2 < line["experts_touched"]["A"] <= 8


def test_a_decode_step_beside_what_its_parts_need():
    """Two layers: attention reads for 2 ms and computes for 1, experts read for 1 and compute for 3, the head reads."""
    machine = Ceilings(read_gb_s=1, float32_gflop_s=1, bfloat16_gflop_s=0.5)
    parts = [
        Part("attention decode", "8 x 1 at 512", 3e-3, Cost(2e6, 1e6)),
        Part("experts", "8 rows", 5e-3, Cost(1e6, 3e6)),
        Part("head", "8 rows", 1e-3, Cost(1e6, 0)),
        Part("experts", "32 rows", 5e-3, Cost(1e6, 3e6)),
    ]
    (step,) = decode_steps(parts, layers=2)
    assert step.seconds == pytest.approx(17e-3)
    assert step.limit_s(machine, "bfloat16") == pytest.approx(11e-3)
    assert step.serial_s(machine, "bfloat16") == pytest.approx(15e-3)
    (line,) = report.step_lines([step], machine, "bfloat16")
    assert "17.00 ms; part by part, 1.55 times the longer of reading and arithmetic (11.00) and 1.13 times both" in line
