"""Transformers is the oracle: the dumb reference agrees with it on logits, the stages on logits and on greedy ids."""

from dataclasses import replace

import pytest
import torch
from driving import Drive, load_stages, make_layout
from models import cached_checkpoint, hf_model, load_tensors, random_tensors, save_tensors
from reference_model import forward, greedy

from tramontane.stages.config import EXAMPLE, ModelConfig

# (architecture, overrides of the config): windows absent, shorter and longer than the prompt; tied; wide and narrow.
SHAPES = {
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 7}),
    "mistral-long-window": ("MistralForCausalLM", {"sliding_window": 200}),
    "mistral-tied": ("MistralForCausalLM", {"sliding_window": 5, "tie_word_embeddings": True}),
    "mistral-one-kv-head": (
        "MistralForCausalLM",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 4},
    ),
    "mistral-layer-types": (
        "MistralForCausalLM",
        {"sliding_window": 7, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")},
    ),
    "ministral": (
        "MinistralForCausalLM",
        {"sliding_window": 5, "layer_types": ("full_attention", "full_attention", "sliding_attention")},
    ),
    "mixtral": ("MixtralForCausalLM", {}),
    "mixtral-window": ("MixtralForCausalLM", {"sliding_window": 9}),
    "mixtral-top-1": ("MixtralForCausalLM", {"num_experts_per_tok": 1, "num_local_experts": 3, "sliding_window": 16}),
    "mixtral-top-3": ("MixtralForCausalLM", {"num_experts_per_tok": 3, "num_local_experts": 8, "sliding_window": 11}),
    "mixtral-all-kv-heads": ("MixtralForCausalLM", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
}
PROMPT = [int(token) for token in torch.randint(3, 99, (70,), generator=torch.Generator().manual_seed(5))]


@pytest.fixture(params=SHAPES)
def folder(request):
    architecture, overrides = SHAPES[request.param]
    return cached_checkpoint(architecture, **overrides)


@torch.no_grad()
def hf_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("length", [1, 6, 70])
def test_reference_logits_agree(folder, length):
    config, tokens = ModelConfig.load(folder), PROMPT[:length]
    expected = hf_logits(hf_model(folder), tokens)
    found = forward(load_tensors(folder), config, tokens)
    assert 0.3 < expected.std() < 3, "weights are scaled so that logits have about unit scale"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_reference_greedy_ids_agree(folder):
    config, model, tokens = ModelConfig.load(folder), hf_model(folder), PROMPT[:20]
    found = greedy(load_tensors(folder), config, tokens, 12)
    expected = list(tokens)
    for _ in range(12):
        expected.append(int(hf_logits(model, expected)[-1].argmax()))
    assert found == expected[20:]


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MixtralForCausalLM"])
def test_transformers_applies_the_window(architecture):
    """The oracle is of use for windows only if it has them: beyond (window - 1) x layers nothing may reach."""
    model = hf_model(cached_checkpoint(architecture, sliding_window=4))
    reach = (4 - 1) * 3
    before = hf_logits(model, PROMPT)
    after = hf_logits(model, [(PROMPT[0] + 1) % 99, *PROMPT[1:]])
    changed = (before != after).any(-1)
    assert changed[: reach + 1].all()
    assert not changed[reach + 1 :].any()


def test_nothing_is_flat():
    """Routing and attention take sides, so that a mistake in either shows."""
    folder = cached_checkpoint("MixtralForCausalLM", sliding_window=9)
    model = hf_model(folder)
    with torch.no_grad():
        output = model(torch.tensor([PROMPT]), output_router_logits=True, output_attentions=True)
    for logits in output.router_logits:
        best = logits.softmax(-1).topk(2).values.sum(-1)
        assert best.mean() > 0.65
        assert len(logits.topk(2).indices.unique()) == 5
    for weights in output.attentions:
        assert weights[0, :, 20:].max(-1).values.mean() > 0.3


# The stages, fed in chunks and token by token.


def drive(folder, split=(), chunk=8, block=4, sequences=1):
    config = ModelConfig.load(folder)
    return Drive(load_stages(folder, config, split), make_layout(config, chunk=chunk, block=block, sequences=sequences))


@pytest.mark.parametrize(("split", "chunk", "block"), [((), 8, 4), ((), 5, 3), ((), 70, 16), ((1, 2), 7, 4)])
def test_stage_logits_agree(folder, split, chunk, block):
    """Prompts shorter and much longer than the windows; windows no multiple of chunk or block."""
    split = (*split[:-1], ModelConfig.load(folder).layers - sum(split[:-1])) if split else split
    driven, model = drive(folder, split, chunk, block), hf_model(folder)
    for length in (1, 6, 70):
        tokens = PROMPT[:length]
        torch.testing.assert_close(driven.whole(tokens), hf_logits(model, tokens), rtol=0, atol=1e-4)


def test_stage_logits_agree_token_by_token(folder):
    found = drive(folder).whole(PROMPT[:40], chunk=1)
    torch.testing.assert_close(found, hf_logits(hf_model(folder), PROMPT[:40]), rtol=0, atol=1e-4)


def test_packed_sequences_agree(folder):
    """Three sequences of different lengths in every microbatch, each against transformers alone."""
    driven, model = drive(folder, sequences=3), hf_model(folder)
    prompts = [PROMPT[:29], PROMPT[30:37], PROMPT[40:70]]
    running = [driven.sequence(prompt) for prompt in prompts]
    found = [[] for _ in prompts]
    while pieces := [
        (index, min(driven.layout.chunk - index, len(sequence.tokens) - sequence.cached))
        for index, sequence in enumerate(running)
        if sequence.cached < len(sequence.tokens)
    ]:
        logits = driven.logits(*((running[index], length) for index, length in pieces))
        for (index, _), rows in zip(pieces, logits, strict=True):
            found[index].append(rows)
    for prompt, rows in zip(prompts, found, strict=True):
        torch.testing.assert_close(torch.cat(rows), hf_logits(model, prompt), rtol=0, atol=1e-4)


def test_stage_greedy_ids_agree(folder):
    """Prefill in chunks, then decode far past the windows."""
    driven, model = drive(folder, (1, ModelConfig.load(folder).layers - 1)), hf_model(folder)
    for length in (3, 33):
        prompt = PROMPT[:length]
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0,
                eos_token_id=None,
            )  # fmt: skip
        assert driven.greedy(prompt, 30) == output[0, length:].tolist()


@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("windows", [(None, 5, 5), (7, 3, None, 7), (2, 9)])
def test_windows_that_differ_by_layer_agree_with_the_reference(tmp_path, windows, tied, experts):
    """No config.json of transformers says most of this; the reference, which agrees with it on all else, stands in."""
    config = replace(
        EXAMPLE, windows=windows, tied=tied, experts=experts, experts_per_token=min(experts, 2), vocab=99, dim=40
    )
    tensors = random_tensors(config, seed=3)
    save_tensors(tmp_path, tensors)
    layout = make_layout(config, chunk=6, block=4)
    driven = Drive(load_stages(tmp_path, config, [1, len(windows) - 1]), layout)
    tokens = PROMPT[:50]
    torch.testing.assert_close(driven.whole(tokens), forward(tensors, config, tokens), rtol=0, atol=1e-4)
    assert driven.greedy(tokens[:11], 20) == greedy(tensors, config, tokens[:11], 20)
