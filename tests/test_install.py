"""The distribution as users get it: the base alone in a bare environment, and what commands say of missing extras."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from fake_server import FakeServer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The programs' folder of an environment that has the wheel, and nothing that the wheel does not ask for."""
    folder = tmp_path_factory.mktemp("bare")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("tramontane-*.whl")
    venv.create(folder / "environment", symlinks=True)
    programs = folder / "environment" / "bin"
    install = ["--python", programs / "python", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run([*pip, *install], check=True)
    return programs


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=120, cwd="/")


def test_the_base_is_light(bare):
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", bare / "python", "list", "--format", "json"],
        capture_output=True,
        check=True,
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    wanted = {"tramontane", "click", "grpcio", "grpcio-health-checking", "grpcio-status", "protobuf"}
    assert wanted <= names
    assert names - wanted <= {"googleapis-common-protos", "typing-extensions", "typing_extensions"}


def test_the_client_works_without_any_extra(bare):
    with FakeServer() as server:
        said = run(bare / "tramontane", "generate", "ab", "--max-tokens", "3", "--target", server.target)
        assert (said.returncode, said.stdout) == (0, "cde\n"), said.stderr
        listed = run(bare / "tramontane", "models", "--json", "--target", server.target)
        assert json.loads(listed.stdout)[0]["name"] == "counting"
    helped = run(bare / "tramontane", "--help")
    assert helped.returncode == 0
    assert all(verb in helped.stdout for verb in ("bench", "generate", "health", "models", "serve"))


@pytest.mark.parametrize(("verb", "extra"), [(["bench", "run"], "bench"), (["serve"], "serve"), (["down"], "serve")])
def test_a_verb_names_the_extra_that_it_needs(bare, verb, extra):
    said = run(bare / "tramontane", *verb)
    assert said.returncode == 1
    assert f"pip install '.[{extra}]' in a checkout" in said.stderr
    assert "Traceback" not in said.stderr


def test_the_wheel_is_typed_and_has_its_data(bare):
    script = (
        "from importlib.resources import files\n"
        "print(files('tramontane').joinpath('py.typed').is_file(),"
        " files('tramontane.deploy').joinpath('embedded/config.json').is_file())\n"
    )
    assert run(bare / "python", "-c", script).stdout == "True True\n"
