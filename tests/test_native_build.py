"""How the native kernels come to be: compiled once, kept privately, and what happens where they cannot be had."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_sets import FACTS, needs_native
from models import random_tensors, save_tensors

from tramontane.stages.config import EXAMPLE
from tramontane.stages.cpu import Cpu
from tramontane.stages.kernels import choose_kernels
from tramontane.stages.kernels.native import build
from tramontane.stages.kernels.native.build import NativeUnavailable
from tramontane.stages.stage import Stage
from tramontane.stages.variants import VARIANTS, KernelChoice, Variants

NAME = FACTS.variants("float32")[0] if FACTS.variants("float32") else "avx2"
OLD_CPU = Cpu("Maker 1-1", "an old CPU", frozenset({"avx2", "sse4_2"}))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path / "cache" / "tramontane"
    build.library.cache_clear()


def compiler(tmp_path, monkeypatch, script):
    """`CXX` is a script that answers `--version` and does as it is told otherwise."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "one 1.0" && exit\n{script}\n')
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))


@needs_native
def test_four_processes_at_once_compile_once(tmp_path):
    """Into an empty cache, with the real compiler; whoever comes second waits and loads what the first has made."""
    code = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from tramontane.stages.kernels.native.build import library\n"
        f"print(library({NAME!r})._name, library({NAME!r}).tramontane_panel_columns())"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TRAMONTANE_KERNELS", None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    said = [process.communicate(timeout=250) for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert len({out for out, _ in said}) == 1
    assert sum(err.count("compiled in") for _, err in said) == 1
    folder = tmp_path / "tramontane"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.suffix for file in folder.iterdir() if file.suffix != ".lock"] == [".so"]


def test_other_sources_another_compiler_other_flags_are_another_file(tmp_path, monkeypatch):
    *_, other, variant = VARIANTS
    keys = {build._key(variant, "g++ 12"), build._key(variant, "g++ 13"), build._key(other, "g++ 12")}
    (tmp_path / "engine.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    keys.add(build._key(variant, "g++ 12"))
    assert len(keys) == 4


def reason(caplog):
    """Why the kernels that were chosen are not the native ones: one line of the log."""
    with caplog.at_level(logging.INFO):
        kernels = choose_kernels(EXAMPLE, dtype="float32", device="cpu")
    assert kernels.name.startswith("cpu-")
    (said,) = (message for message in caplog.messages if not message.startswith("compiling"))
    assert "\n" not in said
    begin = "no native kernels, torch's packed products instead: "
    assert said.startswith(begin)
    return said.removeprefix(begin)


@pytest.fixture
def by_default(monkeypatch):
    monkeypatch.delenv("TRAMONTANE_KERNELS", raising=False)


def test_without_a_compiler(empty_cache, by_default, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert reason(caplog) == "there is no C++ compiler (g++)"


def test_a_compiler_that_is_not_there(empty_cache, by_default, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++ -O1")
    assert reason(caplog) == "the C++ compiler /nowhere/g++ -O1 does not run"


def test_while_it_compiles_it_says_so(empty_cache, by_default, tmp_path, monkeypatch):
    """The compiler ends when the test has seen it, and fails."""
    os.mkfifo(tmp_path / "pipe")
    compiler(tmp_path, monkeypatch, f"read go < {tmp_path / 'pipe'}; exit 1")
    assert not build.is_compiling()
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(build.library, NAME)
        with open(tmp_path / "pipe", "w") as pipe:  # opens once the compiler reads
            assert build.is_compiling()
            pipe.write("\n")
        assert isinstance(outcome.exception(60), NativeUnavailable)
    assert not build.is_compiling()


def test_a_compiler_that_fails(empty_cache, by_default, tmp_path, monkeypatch, caplog):
    compiler(tmp_path, monkeypatch, "echo 'in line 1:' >&2; echo 'a.cpp:1: error: no such luck' >&2; exit 1")
    assert reason(caplog) == f"{tmp_path}/compiler failed: a.cpp:1: error: no such luck"
    assert [file.suffix for file in empty_cache.iterdir()] == [".lock"], "nothing half made is left"


def test_a_compiler_that_writes_nonsense(empty_cache, by_default, tmp_path, monkeypatch, caplog):
    compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    assert reason(caplog).startswith("the library cannot be kept or loaded: ")
    assert [file.suffix for file in empty_cache.iterdir()] == [".lock"]


def test_a_cpu_without_the_instructions_gets_the_next_best(by_default, monkeypatch, caplog):
    monkeypatch.setattr("tramontane.stages.kernels.this_cpu", lambda: OLD_CPU)
    assert reason(caplog) == "the CPU has no AVX2 with FMA"


def test_a_variant_is_not_loaded_on_a_cpu_without_its_instructions(empty_cache, monkeypatch):
    """Chosen for all stages, before this one came to a lesser node: its first step would be an illegal instruction."""
    monkeypatch.setattr(build, "this_cpu", lambda: OLD_CPU)
    chosen = KernelChoice(kernels="native", variants=Variants.alike("avx2"))
    with pytest.raises(ValueError, match=r"the native avx2 kernels, which all stages .* not there: the CPU has no fma"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu", name=chosen)


def test_asked_for_by_name_they_must_be_there(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    folder = save_tensors(tmp_path / "model", random_tensors(EXAMPLE))
    for options in ({"kernels": "native"}, {"quantize": "int8"}):
        with pytest.raises(ValueError, match="the native kernels, which were asked for, are not there: the C"):
            Stage.load(EXAMPLE, folder, range(4), dtype="float32", device="cpu", **options)


def test_the_environment_names_a_set(monkeypatch):
    monkeypatch.setenv("TRAMONTANE_KERNELS", "reference")
    assert choose_kernels(EXAMPLE, dtype="float32", device="cpu").name == "reference-float32"
    assert choose_kernels(EXAMPLE, dtype="float32", device="cpu", name="cpu").name.startswith("cpu-")
    monkeypatch.setenv("TRAMONTANE_KERNELS", "fast")
    with pytest.raises(ValueError, match="kernels is 'fast'"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu")


def test_what_was_chosen_for_all_stages_is_not_for_the_environment_to_change(monkeypatch):
    monkeypatch.setenv("TRAMONTANE_KERNELS", "reference")
    chosen = KernelChoice(kernels="cpu")
    assert choose_kernels(EXAMPLE, dtype="float32", device="cpu", name=chosen).name.startswith("cpu-")


def test_a_home_that_cannot_be_written_falls_back_to_a_private_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build.cache_folder()
    assert folder == tmp_path / f"tramontane-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("harm", ["writable by others", "a link"])
def test_a_folder_that_others_could_write_is_not_trusted(tmp_path, monkeypatch, harm):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "none" / "such"))
    (tmp_path / "none").write_text("")
    if harm == "a link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "tramontane").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "tramontane").mkdir()
        (tmp_path / "tramontane").chmod(0o777)
    with pytest.raises(NativeUnavailable, match="private folder"):
        build.cache_folder()
