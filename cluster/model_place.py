"""The folder that a user's MODEL_DIR means, and what its model is called where no name is given."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME, as Hugging Face's hub calls a model."""
CACHED = "models--"
"""The hub's cache has a folder `models--ORG--NAME`, and in it `snapshots/COMMIT`."""


def find_model(given: Path) -> tuple[Path, str]:
    """The absolute folder, and a name: the folder's own, or ORG/NAME of a snapshot in the hub's cache.

    Raises:
        ValueError: there is no such folder, and it looks like a name on the hub.
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
    # A link is called as its user calls it; `..` is no name.
    own = folder.name if folder.name != ".." else real.name
    return own or "model"
