"""Compiles the native kernels on first use and keeps the result while sources, compiler and CPU stay the same.

The library lies in the user's cache folder under a name that is a hash of all three. Of several processes that miss it
at once, one compiles while the others wait for its lock; the file appears by a rename, so nobody loads half of one.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess  # runs the compiler that the user's machine has
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "c++")
LIMIT_S = 300
"""For one compilation; it takes about ten seconds on a slow core."""


_compiling = threading.Event()


class NativeUnavailable(Exception):  # noqa: N818  (says what is the case)
    """The native kernels cannot run here; the message says why, in one line."""


@dataclass(frozen=True)
class Variant:
    """One build of the sources, for CPUs with some instructions."""

    name: str
    needs: frozenset[str]
    """The CPU's flags as /proc/cpuinfo names them."""
    flags: tuple[str, ...]


def _variant(name: str, *instructions: str) -> Variant:
    needs = frozenset(each.replace("vnni", "_vnni").replace("bf16", "_bf16") for each in instructions)
    return Variant(name, needs, tuple(f"-m{each}" for each in instructions))


AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
VARIANTS = (
    _variant("avx512bf16", *AVX512, "avx512bf16"),
    _variant("avx512", *AVX512),
    _variant("avx2", "avx2", "fma"),
)
"""The best first. A variant's flags are named one by one, so that its rounding is the same on all CPUs that have it."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or fresh.

    Raises:
        NativeUnavailable: there is no compiler, it fails, or the CPU lacks the instructions.
    """
    variant = choose_variant(cpu_flags())
    compiler, version = find_compiler()
    file = cache_folder() / f"native-{variant.name}-{_key(variant, version)}.so"
    try:
        if not file.exists():
            _compiling.set()
            log.info("compiling the native kernels (%s) with %s: some 15 s, once", variant.name, compiler[0])
            _compile_once(compiler, variant, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeUnavailable(f"the library cannot be kept or loaded: {error}") from None
    finally:
        _compiling.clear()


def is_compiling() -> bool:
    """Whether this process compiles now, or waits for another that does: everything else waits meanwhile."""
    return _compiling.is_set()


def source_digest() -> str:
    """SHA-256, in hex, over the sources and FLAGS: with the variant, all of ours that decides rounding."""
    digest = hashlib.sha256("\n".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h*")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def choose_variant(flags: frozenset[str]) -> Variant:
    """The best variant that a CPU with these flags runs.

    >>> choose_variant(frozenset({"avx2", "fma", "sse4_2"})).name
    'avx2'

    Raises:
        NativeUnavailable: it runs none.
    """
    for variant in VARIANTS:
        if variant.needs <= flags:
            return variant
    raise NativeUnavailable("the CPU has no AVX2 with FMA")


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the kernel's words; nothing where that is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def find_compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler (`CXX`, or the first that is there), and its version.

    Raises:
        NativeUnavailable: there is none, or it does not run.
    """
    wanted = os.environ.get("CXX")
    command = shlex.split(wanted) if wanted else [name for name in COMPILERS if shutil.which(name)][:1]
    if not command:
        raise NativeUnavailable("there is no C++ compiler (g++)")
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        raise NativeUnavailable(f"the C++ compiler {shlex.join(command)} does not run") from None
    return command, done.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """A folder that only this user writes: the user's cache, or one in the temporary folder.

    Raises:
        NativeUnavailable: neither can be had.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(home) / "tramontane", Path(tempfile.gettempdir()) / f"tramontane-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat(follow_symlinks=False)
        except OSError:
            continue
        private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if private and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise NativeUnavailable(f"neither {home} nor the temporary folder takes a private folder for the compiled kernels")


def _key(variant: Variant, version: str) -> str:
    """Over everything that decides what comes out."""
    said = "\n".join([version, *variant.flags, source_digest()])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _compile_once(compiler: list[str], variant: Variant, file: Path) -> None:
    """Make the file, unless another process does so meanwhile."""
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        if not file.exists():
            _compile(compiler, variant, file)


def _compile(compiler: list[str], variant: Variant, file: Path) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [*compiler, *FLAGS, *variant.flags, str(SOURCES / "engine.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise NativeUnavailable(f"{compiler[0]} took longer than {LIMIT_S} s") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeUnavailable(f"{compiler[0]} failed: {errors[0] if errors else f'status {done.returncode}'}")
        ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        os.replace(made, file)
    log.info("native kernels (%s) compiled in %.0f s: %s", variant.name, time.monotonic() - begin, file)
