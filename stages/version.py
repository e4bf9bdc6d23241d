"""The version of what a service computes: a sequence goes on only where the same version serves. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def combine_version(
    *,
    files: Mapping[str, bytes],
    dtype: str,
    digests: Sequence[Mapping[str, bytes]],
    numerics: Sequence[str],
) -> str:
    """SHA-256, in hex, over everything that decides which token comes next; no path and no time.

    `files` are the digests of the checkpoint folder's small files (`folder.SMALL_FILES`), of those that are there;
    `digests`, of tensors, and `numerics` have one entry a stage, in order. How the layers are split does not count,
    unless the stages' numerics differ.

    Raises:
        ValueError: two stages have read different bytes of the same tensor; names it.
    """
    tensors: dict[str, bytes] = {}
    for stage, owned in enumerate(digests):
        for name, digest in owned.items():
            if tensors.setdefault(name, digest) != digest:
                raise ValueError(f"tensor {name}: stage {stage} has read other bytes than a stage before it")
    same_everywhere = len(set(numerics)) == 1
    parts: list[tuple[str, bytes]] = [
        *((f"file {name}", files[name]) for name in sorted(files)),
        ("dtype", dtype.encode()),
        *((f"tensor {name}", tensors[name]) for name in sorted(tensors)),
        *(("numerics", one.encode()) for one in (numerics[:1] if same_everywhere else numerics)),
    ]
    total = hashlib.sha256()
    for label, content in parts:
        # Each part by its own digest, so that no byte can move from one part to the next unseen.
        total.update(hashlib.sha256(label.encode()).digest() + hashlib.sha256(content).digest())
    return total.hexdigest()
