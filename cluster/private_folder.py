"""Folders of this user's alone on this node: one of each service for its sockets and its secret, one for its log files.

A folder is no safer than those above it: who may rename one of them puts another in its place. So all of them belong to
this user or to root, and where others may write, the sticky bit keeps them from renaming what is not theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

OPEN_TO_OTHERS = 0o077
"""Permissions of group and everybody: a private folder gives them none."""
OTHERS_WRITE = 0o022
SECRET_BYTES = 32
LONGEST_FOLDER = 80
"""Bytes of the path; a socket's has 107 at most, and `/stage-0.999-4194304.sock` comes behind."""
KEPT_LOGS = 10
"""Folders of log files of services that are over; older ones go when another service starts."""


def check_private(folder: Path) -> None:
    """Nobody but this user, and root, may enter the folder, rename it or put another in its place.

    Raises:
        ValueError: somebody may; says who, where and what would be right.
    """
    me = os.geteuid()
    if Path(os.path.realpath(folder)) != folder.absolute():
        raise ValueError(f"folder {folder} leads through a symbolic link; give {os.path.realpath(folder)}")
    found = folder.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != me or mode & OPEN_TO_OTHERS:
        raise ValueError(f"folder {folder} has mode {mode:o} and owner {found.st_uid}; it must be 700 and {me}")
    for above in folder.absolute().parents:
        found = above.lstat()
        if found.st_uid not in (me, 0):
            raise ValueError(f"folder {folder} lies in {above}, whose owner {found.st_uid} may rename what is in it")
        if found.st_mode & OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            raise ValueError(f"folder {folder} lies in {above}, in which others may rename it: it lacks the sticky bit")


def sockets_folder(identity: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Where this node's parts of a service keep sockets and secret: below the session's folder, else the temporary one.

    The session's is XDG_RUNTIME_DIR, where it is this user's alone.

    Raises:
        ValueError: sockets there would have paths that are too long.
    """
    folder = _runtime(environment) / "run" / identity
    size = len(os.fsencode(folder))
    if size > LONGEST_FOLDER:
        raise ValueError(
            f"folder {folder} has {size} bytes, and {LONGEST_FOLDER} are the limit where sockets lie; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter one"
        )
    return folder


def services_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder where this user's `serve` commands record their services. It is made if it is not there, and private.

    Raises:
        ValueError: see `check_private`.
        OSError: it cannot be made.
    """
    folder = _runtime(environment) / "services"
    for each in (folder.parent, folder):
        _make(each)
    return folder


def logs_folder(identity: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Where this node's parts of a service write their logs: below XDG_STATE_HOME, by default ~/.local/state."""
    home = environment.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    base = Path(os.path.realpath(home)) / "tramontane"
    try:
        _make(base)
    except (OSError, ValueError):  # a user without a home, or one that others may write to
        base = _temporary()
    return base / "logs" / identity


class SharedFolder:
    """A private folder that some processes of one service share; each holds it from construction until `leave`.

    The kernel lets go of it when a process dies, so the folder of a service that is over can be told from others.
    (The lock also keeps systemd from ageing it out of the temporary folder.)
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Create it if it is not there, and remove its neighbours that nobody holds, but for the `keep` newest.

        Raises:
            ValueError: see `check_private`.
            OSError: it cannot be made.
        """
        self.path = path
        self._lock = _enter(path)
        _sweep(path.parent, keep)

    def leave(self, *, remove: bool = True) -> None:
        """Let go; the last one to leave removes the folder and what is in it."""
        if self._lock >= 0:
            if remove:
                _remove_if_free(self.path, self._lock)
            os.close(self._lock)
            self._lock = -1

    def secret(self) -> bytes:
        """The same random bytes for all who share the folder, in a file that only this user reads."""
        path = self.path / "secret"
        if not path.exists():
            descriptor, mine = tempfile.mkstemp(dir=self.path)  # of mode 600
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
            with contextlib.suppress(FileExistsError):  # another was first, and its secret counts
                os.link(mine, path)
            os.unlink(mine)
        secret = path.read_bytes()
        assert len(secret) == SECRET_BYTES, f"{path} holds {len(secret)} bytes"
        return secret


def _runtime(environment: Mapping[str, str]) -> Path:
    """Our folder below XDG_RUNTIME_DIR, where that is this user's alone; else the one in the temporary folder."""
    session = environment.get("XDG_RUNTIME_DIR")
    if session and Path(session).is_absolute():
        with contextlib.suppress(OSError, ValueError):
            real = Path(os.path.realpath(session))
            check_private(real)
            return real / "tramontane"
    return _temporary()


def _temporary() -> Path:
    return Path(os.path.realpath(tempfile.gettempdir())) / f"tramontane-{os.geteuid()}"


def _make(folder: Path) -> None:
    """Create it for this user alone, and check it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_private(folder)


def _enter(path: Path) -> int:
    """A descriptor of the folder, with a shared lock on it."""
    while True:
        for folder in (path.parent.parent, path.parent, path):
            _make(folder)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits only while somebody removes the folder
            if _is_at(lock, path):
                return lock
            os.close(lock)


def _sweep(base: Path, keep: int) -> None:
    with contextlib.suppress(OSError):  # another sweeps at the same time
        over = sorted((folder for folder in base.iterdir() if folder.is_dir()), key=lambda each: each.stat().st_mtime)
        for folder in over[: max(0, len(over) - keep)]:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _remove_if_free(folder, lock)
            finally:
                os.close(lock)


def _remove_if_free(folder: Path, lock: int) -> None:
    """Remove it, where no other process holds it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
