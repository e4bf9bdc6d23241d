"""Where sockets, secrets and logs lie: nobody else enters, renames or replaces the folder, and nothing is left over."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from strangers import STRANGER, needs_root
from wires import socket_folder

from tramontane.cluster.private_folder import SharedFolder, check_private, logs_folder, sockets_folder


@pytest.fixture
def folder():
    with socket_folder() as path:
        yield path


def private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True)
    return path


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o720])
def test_a_folder_that_others_enter_is_refused(folder, mode):
    path = private(folder / "ours")
    check_private(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"has mode {mode:o} and owner {os.geteuid()}; it must be 700"):
        check_private(path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_could_rename_is_refused_however_far_up(folder, mode):
    path = private(folder / "above" / "between" / "ours")
    (folder / "above").chmod(mode)
    with pytest.raises(ValueError, match=f"lies in {folder}/above, in which others may rename it"):
        check_private(path)
    (folder / "above").chmod(mode | stat.S_ISVTX)
    check_private(path)


def test_a_symbolic_link_on_the_way_is_refused(folder):
    path = private(folder / "real" / "ours")
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(ValueError, match=f"leads through a symbolic link; give {path}"):
        check_private(folder / "link" / "ours")


@pytest.mark.parametrize("owned", ["ours", "above"])
@needs_root
def test_what_belongs_to_a_stranger_is_refused(folder, owned):
    path = private(folder / "above" / "ours")
    os.chown(path if owned == "ours" else path.parent, STRANGER, STRANGER)
    with pytest.raises(ValueError, match=f"owner {STRANGER}"):
        check_private(path)


def test_sockets_lie_in_the_sessions_folder_where_it_is_ones_own(folder):
    session = private(folder / "session")
    assert sockets_folder("abc", {"XDG_RUNTIME_DIR": str(session)}) == session / "tramontane" / "run" / "abc"
    own = Path(tempfile.gettempdir()) / f"tramontane-{os.geteuid()}" / "run" / "abc"
    session.chmod(0o755)
    for environment in ({}, *({"XDG_RUNTIME_DIR": text} for text in ("", "run", str(session), f"{session}/none"))):
        assert sockets_folder("abc", environment) == own


def test_a_folder_that_is_too_long_for_sockets_is_said_at_once(folder):
    session = private(folder / ("x" * 40))
    with pytest.raises(ValueError, match=r"has \d+ bytes, and 80 are the limit where sockets lie"):
        sockets_folder("0123456789abcdef", {"XDG_RUNTIME_DIR": str(session)})


def test_logs_lie_in_the_users_state_and_without_one_in_the_temporary_folder(folder):
    state = private(folder / "state")
    assert logs_folder("abc", {"XDG_STATE_HOME": str(state)}) == state / "tramontane" / "logs" / "abc"
    state.chmod(0o777)
    own = Path(tempfile.gettempdir()) / f"tramontane-{os.geteuid()}" / "logs" / "abc"
    (folder / "file").write_text("no folder")
    for text in (str(state), str(folder / "file")):
        assert logs_folder("abc", {"XDG_STATE_HOME": text}) == own


def test_all_who_share_a_folder_have_one_secret_that_only_their_user_reads(folder):
    first, second = (SharedFolder(folder / "base" / "run" / "abc") for _ in range(2))
    other = SharedFolder(folder / "base" / "run" / "def")
    assert first.secret() == second.secret() != other.secret()
    assert len(first.secret()) == 32
    assert [path.name for path in first.path.iterdir()] == ["secret"]
    assert stat.S_IMODE((first.path / "secret").stat().st_mode) == 0o600
    for path in (first.path, first.path.parent, first.path.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for shared in (first, second, other):
        shared.leave()


def test_the_last_one_to_leave_removes_the_folder(folder):
    first, second = (SharedFolder(folder / "base" / "run" / "abc") for _ in range(2))
    first.secret()
    first.leave()
    first.leave()
    assert (second.path / "secret").exists()
    second.leave()
    assert not second.path.exists()
    third = SharedFolder(second.path)
    assert not list(third.path.iterdir())
    third.leave(remove=False)
    assert third.path.exists()


def test_folders_that_nobody_holds_any_more_are_swept_but_for_the_newest(folder):
    base = folder / "base" / "logs"
    living = SharedFolder(base / "living")
    os.utime(living.path, (0, 0))
    for number in range(4):
        over = SharedFolder(base / f"over{number}", keep=9)
        over.leave(remove=False)  # as one does that is killed
        os.utime(over.path, (100 + number, 100 + number))
    SharedFolder(base / "new", keep=3).leave(remove=False)
    assert sorted(path.name for path in base.iterdir()) == ["living", "new", "over2", "over3"]
    newer = SharedFolder(base / "newer")
    assert sorted(path.name for path in base.iterdir()) == ["living", "newer"]
    living.leave()
    newer.leave()
