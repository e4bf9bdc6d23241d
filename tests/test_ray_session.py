"""What is left of a Ray of our own: its session's folder goes, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tramontane.cluster.ray_session import OwnSession


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("session_1", "session_2"):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs" / "raylet.out").write_text("what it said")
    return tmp_path


def test_its_own_folder_goes_with_the_link_to_it(folder):
    (folder / "session_latest").symlink_to(folder / "session_1")
    assert OwnSession(folder / "session_1").remove()
    assert [path.name for path in folder.iterdir()] == ["session_2"]


def test_a_later_sessions_link_stays(folder):
    (folder / "session_latest").symlink_to(folder / "session_2")
    assert OwnSession(folder / "session_1").remove()
    assert (folder / "session_latest" / "logs").is_dir()


@pytest.mark.parametrize("how", ["folder", "link"])
def test_what_another_has_put_in_its_place_stays(folder, how):
    session = OwnSession(folder / "session_1")
    (folder / "session_1").rename(folder / "away")
    if how == "folder":
        (folder / "session_2").rename(folder / "session_1")
    else:
        (folder / "session_1").symlink_to(folder / "session_2")
    assert not session.remove()
    assert (folder / "session_1" / "logs" / "raylet.out").exists()
