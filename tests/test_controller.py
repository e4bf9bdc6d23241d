"""The controller over a platform that can be computed by hand: what it creates, in which order, and what it says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from fake_platform import ADDRESS, AVX2, AVX512, FakePlatform
from models import make_checkpoint

from tramontane.cluster import answer_watch
from tramontane.cluster import controller as controlling
from tramontane.cluster.controller import Controller, ServicePhase
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.routes import LinkNews
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.spec import Loaded, ServiceSpec
from tramontane.cluster.stats import process_facts
from tramontane.stages.folder import SmallFiles
from tramontane.stages.kernel_choice import NodeKernels
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.variants import KernelChoice, Variants


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "MixtralForCausalLM")


@pytest.fixture
def spec(folder) -> ServiceSpec:
    return ServiceSpec(
        identity="this one",
        generation=1,
        name="m",
        model_dir=str(folder),
        files=SmallFiles.read(folder).digests,
        spans=((0, 2), (2, 3)),
        dtype="float32",
        quantize=None,
        device="cpu",
        kernels=None,
        allow_mixed_numerics=False,
        scheduler=SchedulerOptions(
            layout=KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(10,)),
            context=64,
            max_batch_tokens=16,
            max_waiting=4,
        ),
        sampleable_ids=60,
        unnamed_ids=(),
        cpus_per_stage=0.5,
        threads=1,
        entrance=Entrance(),
        hang_limit_s=45.0,
        link_silence_s=45.0,
        log_level="info",
    )


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def started(spec) -> tuple[Controller, FakePlatform, asyncio.Task]:
    platform = FakePlatform()
    controller = Controller(spec, platform, lambda: process_facts("controller", "0", "n"))
    return controller, platform, asyncio.create_task(controller.run())


async def test_the_service_comes_up_in_order(spec) -> None:
    controller, platform, _ = await started(spec)
    await until(lambda: controller.status().phase is ServicePhase.LOADING and "loading 0.5" in platform.log)
    assert controller.status().port == 4242
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    log = [entry for entry in platform.log if not entry.startswith("loading")]
    assert log == [
        "create gateway-0",
        "listen",
        "reserve 0",
        "create stage-0.0",
        "create stage-0.1",
        "ask stage 0",
        "ask stage 1",
        "probe",
        "record",
        "record",
        "model 64 True",
        "create router-0 over 2",
        "bind",
        f"routes 5 {[('router-0', ADDRESS)]}",
    ]
    await controller.stop()
    assert platform.log[-2:] == ["close gateway", "end"]
    assert controller.status().phase is ServicePhase.STOPPED


async def test_a_compile_at_the_first_use_is_said_while_it_lasts(spec) -> None:
    controller, platform, _ = await started(spec)
    platform.compiling = True
    await until(lambda: controller.status().detail == "compiling the CPU kernels: once, some 15 s")
    assert controller.status().phase is ServicePhase.LOADING
    platform.compiling = False
    await until(lambda: controller.status().detail == "")
    platform.compiling = True
    await until(lambda: controller.status().detail != "")
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    assert controller.status().detail == ""
    await controller.stop()


async def test_why_a_service_broke_while_it_was_loading_stays_said(spec) -> None:
    controller, platform, run = await started(spec)
    await until(lambda: "loading 0.5" in platform.log)
    platform.gateway_gone.set_result("killed")
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    told = platform.log.count("loading 0.5")
    await until(lambda: platform.log.count("loading 0.5") > told)
    platform.loaded.set()
    await run
    assert (controller.status().phase, controller.status().detail) == (ServicePhase.BROKEN, "gateway 0: killed")
    await controller.stop()
    assert controller.status().phase is ServicePhase.STOPPED


async def test_room_that_is_lacking_is_said_and_waited_for(spec) -> None:
    controller, _platform, _ = await started(spec)
    said = set()
    async with asyncio.timeout(10):
        while controller.status().phase is not ServicePhase.LOADING:
            said.add(controller.status().detail)
            await asyncio.sleep(0)
    assert "no room: 2 CPU are missing; waiting for 30 s" in said
    assert controller.status().detail == ""
    await controller.stop()


async def test_a_stage_that_cannot_load_is_named(spec) -> None:
    controller, platform, run = await started(spec)
    platform.load_fails = True
    platform.loaded.set()
    await run
    assert controller.status().phase is ServicePhase.BROKEN
    assert controller.status().detail == "ValueError: tensor model.norm.weight is missing"
    assert platform.log[-1] == "unavailable: ValueError: tensor model.norm.weight is missing"
    await controller.stop()


@pytest.mark.parametrize("part", ["router_broken", "gateway_gone"])
async def test_a_part_that_ends_is_said_at_once(spec, part: str) -> None:
    controller, platform, _ = await started(spec)
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    getattr(platform, part).set_result("killed")
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    assert "killed" in controller.status().detail
    assert platform.log[-1].startswith("unavailable: ")
    await controller.stop()


async def test_parts_of_a_broken_service_are_asked_no_more(spec, monkeypatch) -> None:
    monkeypatch.setattr(answer_watch, "ASK_EVERY_S", 0.0)
    controller, platform, _ = await started(spec)
    platform.loaded.set()
    await until(lambda: platform.asked > 2)
    platform.router_broken.set_result("gone")
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    asked = platform.asked
    for _ in range(100):
        await asyncio.sleep(0)
    assert platform.asked <= asked + 1
    await controller.stop()


async def test_a_lost_link_is_said_and_so_is_its_return(spec, monkeypatch) -> None:
    monkeypatch.setattr(controlling, "ANSWER_TIMEOUT_S", 0.01)
    controller, platform, _ = await started(spec)
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    platform.news.put_nowait(ConnectionError("it was busy"))
    platform.news.put_nowait(LinkNews(number=1, lost=1, trouble="router-0: silent for 45 s"))
    await until(lambda: controller.status().phase is ServicePhase.DEGRADED)
    lost = "gateway-0 has no link with router-0: silent for 45 s"
    assert (controller.status().detail, controller.status().lost_links) == (lost, 1)
    platform.news.put_nowait(LinkNews(number=2, lost=1, trouble=""))
    await until(lambda: controller.status().phase is ServicePhase.READY)
    assert (controller.status().detail, controller.status().lost_links) == (lost, 1)
    platform.router_broken.set_result("killed")
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    platform.news.put_nowait(LinkNews(number=3, lost=2, trouble="router-0: closed by the other end"))
    await until(platform.news.empty)
    assert controller.status().detail == "pipeline 0: killed"
    await controller.stop()


async def test_a_first_link_that_fails_is_said(spec) -> None:
    controller, platform, _ = await started(spec)
    platform.news.get_nowait()
    platform.news.put_nowait(LinkNews(number=0, lost=0, trouble="router-0: timed out"))
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.DEGRADED)
    assert controller.status().version
    platform.news.put_nowait(LinkNews(number=1, lost=0, trouble=""))
    await until(lambda: controller.status().phase is ServicePhase.READY)
    await controller.stop()


async def test_stats_come_from_those_who_answer(spec) -> None:
    controller, platform, _ = await started(spec)
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    stats = await controller.stats()
    assert [process.role for process in stats.processes] == ["controller", "gateway", "router", "stage"]
    assert [stage.name for stage in stats.stages] == ["0.0"]
    assert stats.late == ("stage 1 is late with step 7",)
    assert [gateway.name for gateway in stats.gateways] == ["0"]
    await controller.stop()


def test_a_spec_comes_back_from_its_record(spec) -> None:
    assert ServiceSpec.decode(spec.encode()) == spec
    variants = KernelChoice(kernels="native", variants=Variants(attention="a", experts="b", head="c"))
    loaded = replace(
        spec,
        stage_kernels=(variants, KernelChoice(kernels="cpu")),
        loaded=Loaded(version="v", row_invariant=True, tensors={"t": b"d"}),
    )
    assert ServiceSpec.decode(loaded.encode()) == loaded


async def served(spec) -> tuple[ServiceSpec, str]:
    """The record and the version of a service that has come up."""
    controller, platform, _ = await started(spec)
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    return platform.recorded[-1], controller.status().version


async def test_a_controller_that_comes_back_serves_what_was_loaded_whatever_the_folder_holds(spec, tmp_path) -> None:
    """The folder may be gone: a healthy pipeline needs it no more."""
    record, version = await served(spec)
    assert record == replace(spec, loaded=record.loaded, stage_kernels=record.stage_kernels)
    controller, platform, _ = await started(replace(record, model_dir=str(tmp_path / "gone")))
    platform.lacking = []
    assert controller.status().version == version
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    assert controller.status().version == version
    assert platform.recorded == []


async def test_a_pipeline_whose_room_is_gone_is_not_waited_for_again(spec) -> None:
    """A node is gone, and with it a stage and the controller, which Ray has started elsewhere."""
    record, _ = await served(spec)
    controller, _platform, _ = await started(record)  # its platform lacks room at first
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    assert "the pipeline has lost its room: no room: 2 CPU are missing" in controller.status().detail


async def test_a_stage_that_computes_another_version_does_not_join(spec) -> None:
    record, version = await served(spec)
    controller, platform, _ = await started(record)
    platform.lacking, platform.bytes_on_disk = [], b"other"
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.BROKEN)
    assert f"and version {version} is served" in controller.status().detail
    assert not any(entry.startswith(("model", "routes")) for entry in platform.log)


async def ready(spec, *nodes: NodeKernels) -> tuple[Controller, FakePlatform]:
    controller, platform, _ = await started(spec)
    platform.nodes = list(nodes) or platform.nodes
    platform.loaded.set()
    await until(lambda: controller.status().phase in (ServicePhase.READY, ServicePhase.BROKEN))
    return controller, platform


async def test_all_stages_load_what_was_chosen_once_and_recorded(spec) -> None:
    controller, platform = await ready(spec)
    assert platform.given == ["native avx512"] * 2
    assert (controller.status().kernels, controller.status().warnings) == ("native avx512", ())
    assert platform.recorded[0].stage_kernels == (platform.recorded[0].stage_kernels[0],) * 2
    assert platform.recorded[0].loaded is None, "recorded before anything is loaded"


async def test_a_controller_that_comes_back_asks_nobody_again(spec) -> None:
    """Stages that start later obey the record, whatever their nodes would choose."""
    record, _ = await served(spec)
    controller, platform, _ = await started(record)
    platform.lacking, platform.nodes = [], [NodeKernels("another", AVX2, "")] * 2
    platform.loaded.set()
    await until(lambda: controller.status().phase is ServicePhase.READY)
    assert platform.given == ["native avx512"] * 2
    assert not any(entry.startswith(("ask", "probe")) for entry in platform.log)
    assert controller.status().kernels == "native avx512"


async def test_the_best_that_all_nodes_run_and_who_keeps_them_from_better(spec) -> None:
    controller, platform = await ready(spec, NodeKernels("node 0", AVX512, ""), NodeKernels("node 1", AVX2, ""))
    assert platform.given == ["native avx2"] * 2
    (warning,) = controller.status().warnings
    assert warning.startswith("node 1: its CPU (an older CPU) has no avx512_vnni, avx512bw, ")
    assert warning.endswith(", so that no stage uses avx512, but avx2")


NO_COMPILER = NodeKernels("node 1", AVX512, "there is no C++ compiler (g++)")


async def test_a_node_without_a_compiler_is_named_and_nothing_starts(spec) -> None:
    controller, platform = await ready(spec, NodeKernels("node 0", AVX512, ""), NO_COMPILER)
    assert controller.status().phase is ServicePhase.BROKEN
    assert "node 1: there is no C++ compiler (g++); mend that, or take --kernels cpu" in controller.status().detail
    assert (platform.given, platform.recorded) == ([], [])


async def test_mixed_numerics_are_allowed_by_name_and_no_row_is_invariant_then(spec) -> None:
    allowed = replace(spec, allow_mixed_numerics=True)
    controller, platform = await ready(allowed, NodeKernels("node 0", AVX512, ""), NO_COMPILER)
    assert platform.given == ["native avx512", "cpu"]
    assert controller.status().kernels == "native avx512, cpu"
    assert controller.status().warnings == ("stages round differently: node 1: there is no C++ compiler (g++)",)
    assert "model 64 False" in platform.log
    assert platform.recorded[-1].loaded.row_invariant is False
    _, alike = await ready(allowed)
    assert "model 64 True" in alike.log


@pytest.mark.parametrize(("probed", "kernels"), [(1.19, "avx512"), (1.21, "avx2")])
async def test_an_unknown_cpu_is_probed_and_believed_beyond_a_margin(spec, monkeypatch, probed, kernels) -> None:
    async def probe(_):
        return {"avx512": 1.0, "avx2": probed}

    monkeypatch.setattr(FakePlatform, "probe_kernels", probe)
    _, platform = await ready(spec)
    assert platform.given == [f"native {kernels}"] * 2


async def test_a_probe_that_fails_leaves_the_order(spec, monkeypatch) -> None:
    async def probe(_):
        raise ValueError("the compiler is gone")

    monkeypatch.setattr(FakePlatform, "probe_kernels", probe)
    _, platform = await ready(spec)
    assert platform.given == ["native avx512"] * 2


@pytest.mark.parametrize(
    ("changes", "kernels"), [({"kernels": "cpu"}, "cpu"), ({"device": "cuda"}, "cuda"), ({"kernels": "avx2"}, None)]
)
async def test_where_the_operator_has_said_it_nothing_is_probed(spec, changes, kernels) -> None:
    _, platform = await ready(replace(spec, **changes))
    assert platform.given == [kernels or "native avx2"] * 2
    assert "probe" not in platform.log
    assert any(entry.startswith("ask") for entry in platform.log) == (kernels is None)
