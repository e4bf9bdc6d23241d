"""Through n windowed layers a token reaches exactly n x (W - 1) positions further on: not one bit beyond."""

from dataclasses import replace

import pytest
import torch
from driving import Drive, load_stages, make_layout
from models import random_tensors, save_tensors

from tramontane.stages.config import EXAMPLE

CHANGED = 4
"""The position whose token is changed."""


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize(("layers", "window"), [(1, 2), (1, 8), (2, 1), (2, 5), (3, 8), (4, 4), (4, 7)])
def test_reach(tmp_path, layers, window, chunk, experts):
    config = replace(EXAMPLE, windows=(window,) * layers, experts=experts, context=64)
    folder = save_tensors(tmp_path, random_tensors(config, seed=layers * 10 + window))
    reach = layers * (window - 1)
    tokens = torch.randint(3, 64, (CHANGED + reach + 8,), generator=torch.Generator().manual_seed(1)).tolist()
    changed = tokens.copy()
    changed[CHANGED] = (tokens[CHANGED] + 7) % 64
    drive = Drive(load_stages(folder, config), make_layout(config, chunk=chunk, block=4), poison=True)

    differs = (drive.whole(tokens) != drive.whole(changed)).any(-1).tolist()

    assert differs == [CHANGED <= position <= CHANGED + reach for position in range(len(tokens))]


@pytest.mark.parametrize("chunk", [1, 16])
def test_windows_of_different_layers_add_up(tmp_path, chunk):
    config = replace(EXAMPLE, windows=(3, 8, 5), experts=0, context=64)
    folder = save_tensors(tmp_path, random_tensors(config))
    tokens = list(range(10, 40))
    changed = [9, *tokens[1:]]
    drive = Drive(load_stages(folder, config), make_layout(config, chunk=chunk, block=4), poison=True)
    differs = (drive.whole(tokens) != drive.whole(changed)).any(-1).tolist()
    assert differs == [position <= 2 + 7 + 4 for position in range(30)]
