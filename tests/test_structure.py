"""Who may import whom, and that generated stubs are what the protos say."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tramontane.client

ROOT = Path(__file__).parent.parent

# client -> protos <- cluster -> stages
MAY_IMPORT = {
    "protos": {"protos"},
    "stages": {"stages"},
    "cluster": {"cluster", "stages", "protos"},
    "client": {"client", "protos"},
}
# What the client's dependencies bring along, by their top-level names; grpc imports the last two where they are there.
CLIENT_PACKAGES = {"click", "google", "grpc", "grpc_health", "grpc_status", "typing_extensions"}
CLIENT_PACKAGES |= {"grpc_reflection", "grpc_tools"}


def imported_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter has after importing the modules, without the standard library."""
    script = (
        "import importlib, json, sys\n"
        "before = set(sys.modules)\n"
        f"for name in {list(modules)!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = {name.partition(".")[0] for name in json.loads(result.stdout)}
    # Extensions compiled by Cython register a helper module under a name with Cython's version.
    return {name for name in names - sys.stdlib_module_names if "cython" not in name} - {"tramontane"}


def absolute_imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_in_one_direction(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        ours = {name.split(".")[1] for name in absolute_imports(path) if name.startswith("tramontane.")}
        assert ours - {"__version__"} <= MAY_IMPORT[folder], path


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.py")), ids=lambda path: path.stem)
def test_deploy_uses_only_the_clients_public_surface(path):
    ours = {name for name in absolute_imports(path) if name.startswith("tramontane.")}
    public = {f"tramontane.client.{name}" for name in tramontane.client.__all__} if path.stem == "demo" else set()
    assert {name for name in ours if not name.startswith("tramontane.deploy.")} <= public


def test_the_client_is_light():
    assert imported_by("tramontane.client", "tramontane.client.cli") <= CLIENT_PACKAGES | {
        "cython_runtime",
        "_cython_3_2_4",
    }


def test_importing_stages_imports_nothing():
    assert imported_by("tramontane.stages") == set()


@pytest.mark.parametrize("name", ["config", "kernel_choice", "kv_layout", "microbatch", "split"])
def test_the_contract_with_the_stages_is_light(name):
    assert imported_by(f"tramontane.stages.{name}") <= {"numpy"}


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: path.stem)
def test_stages_know_neither_ray_nor_grpc(path):
    assert not {name.partition(".")[0] for name in absolute_imports(path)} & {"ray", "grpc", "grpc_health"}


@pytest.mark.parametrize("name", ["scheduler", "router", "gateway", "controller"])
def test_only_stage_workers_import_torch(name):
    assert not imported_by(f"tramontane.cluster.{name}") & {"torch", "ray"}


def test_the_scheduler_only_decides():
    assert imported_by("tramontane.cluster.scheduler") <= {"numpy"}
    assert "asyncio" not in absolute_imports(ROOT / "cluster" / "scheduler.py")


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_generated_stubs_do_not_drift(tmp_path, suffix):
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = ["-m", "grpc_tools.protoc", "-Itramontane/protos=protos", *outputs, "tramontane/protos/serving.proto"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    generated = tmp_path / "tramontane" / "protos" / f"serving{suffix}"
    assert (ROOT / "protos" / generated.name).read_text() == generated.read_text(), "run `make protos`"
