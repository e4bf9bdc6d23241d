"""The samplers that this machine runs: torch's, which any kernel set may use, and the native kernels' own."""

from functools import partial
from types import SimpleNamespace

import pytest
from kernel_sets import NEEDS_GPU, choices, needs_native

from tramontane.stages import sampler


def torch_sampler():
    return SimpleNamespace(sample=sampler.sample, score=sampler.score)


def native_sampler():
    from tramontane.stages.kernels.native import sampling
    from tramontane.stages.kernels.native.engine import Engine

    engine = Engine(choices("float32")[0].head)
    return SimpleNamespace(sample=partial(sampling.sample, engine), score=partial(sampling.score, engine))


def cuda_sampler():
    """Torch's, for logits that lie on a GPU."""

    def there(choose):
        return lambda logits, *rest: choose(logits.cuda(), *rest)

    return SimpleNamespace(sample=there(sampler.sample), score=there(sampler.score))


SAMPLERS = [
    pytest.param(torch_sampler, id="torch"),
    pytest.param(cuda_sampler, id="torch-cuda", marks=NEEDS_GPU),
    pytest.param(native_sampler, id="native", marks=needs_native),
]
