"""Values that are read from files again: what becomes of changes, of wrong files, and of ones that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tramontane.cluster.reloading import Reloading, Unreadable, read_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def number(path: Path) -> Reloading[int]:
    return Reloading("numbers", [str(path)], lambda: int(read_bytes("--number", str(path), 100)))


def test_a_change_is_taken_up(path):
    value = number(path)
    assert value.value() == 1
    path.write_text("22")
    assert value.value() == 22


def test_a_wrong_file_changes_nothing_and_is_said_once(path, caplog):
    value = number(path)
    path.write_text("many")
    assert [value.value() for _ in range(3)] == [1, 1, 1]
    assert caplog.text.count("stay as they were") == 1
    path.write_text("333")
    assert value.value() == 333


def test_a_file_that_cannot_be_read_is_tried_again(path, caplog):
    """For want of file descriptors, say: a token that was taken out must not stay valid for ever."""
    failing = [False]

    def read() -> int:
        if failing[0]:
            raise Unreadable("too many open files")
        return int(path.read_text())

    value = Reloading("numbers", [str(path)], read)
    failing[0] = True
    path.write_text("22")
    assert [value.value() for _ in range(3)] == [1, 1, 1]
    assert caplog.text.count("too many open files") == 1
    failing[0] = False
    assert value.value() == 22


def test_a_file_that_goes_and_comes_back(path):
    value = number(path)
    path.unlink()
    assert value.value() == 1
    path.write_text("4444")
    assert value.value() == 4444


def test_a_change_while_it_is_read_is_looked_at_again(path):
    texts = iter(["22", "333"])

    def read() -> str:
        text = path.read_text()
        if after := next(texts, None):
            path.write_text(after)
        return text

    value = Reloading("texts", [str(path)], read)  # reads 1, leaves 22
    seen = [value.value() for _ in range(6)]
    assert seen[-1] == "333"
    assert "22" not in seen  # it was replaced while it was read


def test_what_is_wrong_at_first_is_raised(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        number(tmp_path / "nowhere")
