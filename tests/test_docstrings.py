"""The examples in docstrings are run, so that they cannot grow stale."""

import doctest

import pytest

from tramontane.stages import config, kv_layout, layouts, noise, split


@pytest.mark.parametrize("module", [config, kv_layout, layouts, noise, split], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed
