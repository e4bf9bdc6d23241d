"""The loss of a long text through the serving path is that of one plain forward pass, with generation beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from driving import load_stages
from models import load_tensors
from reference_model import forward

from tramontane.cluster.messages import Sampling, Stopping
from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Sequence
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import plan_kv

TEXT = """MESSENGER:
My lord, the horsemen that you sent abroad
Are come again with mud upon their spurs,
And say the river rises, and the bridge
That bore thy father bears no man at all.

KING:
Then let the river rise; we have no need
To walk on stones where loyal hearts will swim.
Go, bid them light the beacons on the hill.
"""


def serve(stages, scheduler: Scheduler) -> None:
    """Run the pipeline one microbatch at a time until nothing is left."""
    step = 0
    while (microbatch := scheduler.schedule(epoch=1, step=step, now=0.0)) is not None:
        for stage, after in itertools.pairwise(stages):
            rows = stage.step(microbatch)
            after.inbox(len(microbatch.tokens))[:] = rows
        scheduler.update(stages[-1].step(microbatch), now=0.0)
        step += 1


@pytest.mark.parametrize("chunk", [128, 50])
def test_a_long_texts_loss_is_that_of_a_plain_forward_pass(embedded_dir, chunk: int) -> None:
    torch.set_num_threads(1)
    config = ModelConfig.load(embedded_dir)
    tokenizer = Tokenizer.load(embedded_dir, config)
    ids = tokenizer.encode(TEXT * 4, add_bos=True)
    assert len(ids) > 4 * config.smallest_window
    stages = load_stages(embedded_dir, config, [5, 3])
    layout = plan_kv(
        config,
        [stage.span for stage in stages],
        kv_memory_bytes=32 * 2**20,
        chunk=chunk,
        context=config.context,
        dtype="float32",
    )
    options = SchedulerOptions(layout=layout, context=config.context, max_batch_tokens=160, max_waiting=8)
    scheduler = Scheduler(options, stages=2)
    for stage in stages:
        stage.bind(1, layout, config.context, 160)
    scored = Sequence(id=0, prompt=ids, stopping=Stopping(max_tokens=1), score_prompt=True)
    scheduler.add(scored, now=0.0)
    for number in range(1, 4):
        sampling, stopping = Sampling(seed=number), Stopping(max_tokens=40)
        scheduler.add(Sequence(id=number, prompt=ids[: 9 * number], sampling=sampling, stopping=stopping), now=0.0)
    serve(stages, scheduler)

    logits = forward(load_tensors(embedded_dir), config, ids)
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(np.array(scored.scores), expected, atol=1e-4)
    assert scheduler.used_blocks == (0,)
