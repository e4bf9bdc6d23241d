"""The examples in docstrings are run, so that they cannot grow stale."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEED_RAY = {"tramontane.cluster.actors", "tramontane.cluster.ray_platform"}
"""Not imported here, so they hold no examples."""


def modules_with_examples() -> list[str]:
    paths = [path for folder in ("client", "cluster", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(("tramontane", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths]
    return [
        name.removesuffix(".__init__")
        for name, path in zip(names, paths, strict=True)
        if ">>>" in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_hold(name):
    assert name not in NEED_RAY
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted
    assert not outcome.failed
