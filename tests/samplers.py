"""The samplers that this machine runs: torch's, which any kernel set may use, and the native kernels' own."""

from functools import partial
from types import SimpleNamespace

import pytest
from kernel_sets import needs_native

from tramontane.stages import sampler


def torch_sampler():
    return SimpleNamespace(sample=sampler.sample, score=sampler.score)


def native_sampler():
    from tramontane.stages.kernels.native import sampling
    from tramontane.stages.kernels.native.engine import Engine

    engine = Engine()
    return SimpleNamespace(sample=partial(sampling.sample, engine), score=partial(sampling.score, engine))


SAMPLERS = [
    pytest.param(torch_sampler, id="torch"),
    pytest.param(native_sampler, id="native", marks=needs_native),
]
