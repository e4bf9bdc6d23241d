"""What a user calls a model's folder, and what the model is called after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tramontane.cluster.model_place import find_model


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
    assert find_model(Path(given)) == (Path(given).absolute(), name)


def test_a_link_is_called_by_its_own_name_unless_it_leads_into_the_hubs_cache(home: Path) -> None:
    (home / "newest").symlink_to("llamas/alpaca")
    (home / "mistral").symlink_to("hub/models--mistralai--Mistral-7B-v0.1/snapshots/27d67f1b5f57")
    assert find_model(home / "newest")[1] == "newest"
    assert find_model(home / "mistral")[1] == "mistralai/Mistral-7B-v0.1"


def test_a_name_of_the_hubs_says_that_nothing_is_downloaded(home: Path) -> None:
    with pytest.raises(ValueError, match=r"^mistralai/Mistral-7B-v0\.1: no such folder, and nothing is downloaded yet"):
        find_model(Path("mistralai/Mistral-7B-v0.1"))
    for folder in ("missing", "/a/b", "a/b/c", "../a/b"):
        assert find_model(Path(folder))[0] == Path(folder).absolute()
