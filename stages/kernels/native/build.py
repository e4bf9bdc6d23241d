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
from collections.abc import Iterable
from pathlib import Path

from tramontane.stages.cpu import this_cpu
from tramontane.stages.variants import VARIANTS, Variant

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "c++")
LIMIT_S = 300
"""For one compilation; it takes about ten seconds on a slow core."""


_compiling = threading.Event()


class NativeUnavailable(Exception):  # noqa: N818  (says what is the case)
    """The native kernels cannot run here; the message says why, in one line."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """A variant of the compiled kernels, from the cache or fresh.

    Raises:
        NativeUnavailable: the CPU lacks instructions, there is no compiler, or it fails.
    """
    (variant,) = (each for each in VARIANTS if each.name == name)
    if missing := variant.needs - this_cpu().flags:
        raise NativeUnavailable(f"the CPU has no {', '.join(sorted(missing))}")
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
    """Whether this process compiles now, or waits for another that does. Loading stands still meanwhile."""
    return _compiling.is_set()


def obstacle(names: Iterable[str]) -> str:
    """Why one of these variants cannot be had here, in one line; empty where all can. Compiles what is missing."""
    try:
        for name in names:
            library(name)
    except NativeUnavailable as reason:
        return str(reason)
    return ""


def flags_of(variant: Variant) -> list[str]:
    """The compiler's flags for a variant's instructions."""
    return [f"-m{each}" for each in variant.instructions]


def source_digest() -> str:
    """SHA-256, in hex, over the sources and FLAGS: with variant and compiler, all that decides rounding."""
    digest = hashlib.sha256("\n".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h*")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


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


def digest_of(what: str) -> str:
    """A short name for something in the cache that depends on these sources and on `what`."""
    return hashlib.sha256(f"{what}\n{source_digest()}".encode()).hexdigest()[:16]


def _key(variant: Variant, version: str) -> str:
    """Over everything that decides what comes out."""
    return digest_of("\n".join([version, *flags_of(variant)]))


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
        command = [*compiler, *FLAGS, *flags_of(variant), str(SOURCES / "engine.cpp"), "-o", str(made)]
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
