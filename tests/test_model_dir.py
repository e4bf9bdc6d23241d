"""How a user may name a model's folder, and which name the model gets from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tramontane.cluster.model_dir import resolve_model_dir


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "llamas/alpaca/inner").mkdir(parents=True)
    (tmp_path / "hub/models--mistralai--Mistral-7B-v0.1/snapshots/27d67f1b5f57").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "llamas/alpaca/inner")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("..", "alpaca"),
        (".", "inner"),
        ("../..", "llamas"),
        ("../", "alpaca"),
        ("../../alpaca", "alpaca"),
        ("/", "model"),
        ("../../../hub/models--mistralai--Mistral-7B-v0.1/snapshots/27d67f1b5f57", "mistralai/Mistral-7B-v0.1"),
    ],
)
def test_a_model_is_called_as_its_folder(home: Path, given: str, name: str) -> None:
    assert resolve_model_dir(Path(given)) == (Path(given).absolute(), name)


def test_a_link_is_called_by_its_own_name_unless_it_leads_into_the_hubs_cache(home: Path) -> None:
    (home / "newest").symlink_to("llamas/alpaca")
    (home / "mistral").symlink_to("hub/models--mistralai--Mistral-7B-v0.1/snapshots/27d67f1b5f57")
    assert resolve_model_dir(home / "newest")[1] == "newest"
    assert resolve_model_dir(home / "mistral")[1] == "mistralai/Mistral-7B-v0.1"


def test_a_name_of_the_hubs_says_that_nothing_is_downloaded(home: Path) -> None:
    with pytest.raises(ValueError, match=r"^mistralai/Mistral-7B-v0\.1: no such folder, and nothing is downloaded yet"):
        resolve_model_dir(Path("mistralai/Mistral-7B-v0.1"))
    for folder in ("missing", "/a/b", "a/b/c", "../a/b"):
        assert resolve_model_dir(Path(folder))[0] == Path(folder).absolute()
