"""Resolves the MODEL_DIR that a user gives to a folder, and to the name of the model where none is given."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME, a model's name on Hugging Face's hub."""
CACHED = "models--"
"""The hub's cache has a folder `models--ORG--NAME`, and in it `snapshots/COMMIT`."""


def resolve_model_dir(given: Path) -> tuple[Path, str]:
    """The absolute folder and the model's name: the folder's own, or ORG/NAME of a snapshot in the hub's cache.

    Raises:
        ValueError: there is no such folder, and `given` looks like a name on the hub.
    """
    folder = given.absolute()
    if not folder.exists() and HUB_NAME.fullmatch(str(given)):
        raise ValueError(
            f"{given}: no such folder, and nothing is downloaded yet; a model of this name on Hugging Face's hub is "
            f"fetched by `hf download {given}`, which prints the folder to give here"
        )
    return folder, _name(folder)


def _name(folder: Path) -> str:
    real = Path(os.path.realpath(folder))
    for path in (folder, real):
        cached = path.parent.parent.name
        if path.parent.name == "snapshots" and cached.startswith(CACHED):
            return cached.removeprefix(CACHED).replace("--", "/")
    # The name that the user sees counts, that of a link included; but `..` is no name.
    own = folder.name if folder.name != ".." else real.name
    return own or "model"
