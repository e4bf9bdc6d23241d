"""The dumb reference: one whole sequence, float32, dense masks, a loop over tokens for the experts, no cache.

It shares nothing with `tramontane.stages` but the description of the shape, and takes tensors by their Hugging Face
names. `test_against_transformers.py` holds it against transformers.

T tokens, D dim, H query heads, K KV heads, G query heads a KV head, h head_dim, V vocab.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tramontane.stages.config import ModelConfig


@torch.no_grad()
def forward(tensors: dict[str, Tensor], config: ModelConfig, tokens: list[int]) -> Tensor:
    """Logits for every position. [T, V]"""
    hidden_TD = tensors["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer, window in enumerate(config.windows):
        prefix = f"model.layers.{layer}."
        normed_TD = rms_norm(hidden_TD, tensors[prefix + "input_layernorm.weight"], config.norm_eps)
        hidden_TD = hidden_TD + attention(tensors, prefix + "self_attn.", config, normed_TD, window)
        normed_TD = rms_norm(hidden_TD, tensors[prefix + "post_attention_layernorm.weight"], config.norm_eps)
        feed_forward = experts if config.experts else dense
        hidden_TD = hidden_TD + feed_forward(tensors, prefix, config, normed_TD)
    normed_TD = rms_norm(hidden_TD, tensors["model.norm.weight"], config.norm_eps)
    head = tensors["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return linear(normed_TD, head)


def greedy(tensors: dict[str, Tensor], config: ModelConfig, prompt: list[int], n: int) -> list[int]:
    """The `n` most likely next ids, everything computed again for each."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(forward(tensors, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def visible(tokens: int, window: int | None) -> Tensor:
    """Which keys each query sees: itself and what comes before, `window` positions in all. [T, T]

    Four tokens, window 2:  1000  1100  0110  0011
    """
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    sees = key <= query
    return sees if window is None else sees & (key > query - window)


def rotate(x_THh: Tensor, theta: float) -> Tensor:
    """Rotary positions, the first half of each head paired with the second."""
    tokens, _, head_dim = x_THh.shape
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (torch.arange(tokens, dtype=torch.float32)[:, None] * frequency)[:, None, :]
    first, second = x_THh.chunk(2, dim=-1)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim=-1,
    )


def attention(tensors: dict[str, Tensor], prefix: str, config: ModelConfig, x_TD: Tensor, window: int | None) -> Tensor:
    tokens = len(x_TD)
    q = linear(x_TD, tensors[prefix + "q_proj.weight"]).view(tokens, config.heads, config.head_dim)
    k = linear(x_TD, tensors[prefix + "k_proj.weight"]).view(tokens, config.kv_heads, config.head_dim)
    v = linear(x_TD, tensors[prefix + "v_proj.weight"]).view(tokens, config.kv_heads, config.head_dim)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    mask = visible(tokens, window)
    heads = []
    for head in range(config.heads):
        kv_head = head // (config.heads // config.kv_heads)
        scores = q[:, head] @ k[:, kv_head].T / config.head_dim**0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        heads.append(weights @ v[:, kv_head])
    return linear(torch.cat(heads, dim=-1), tensors[prefix + "o_proj.weight"])


def dense(tensors: dict[str, Tensor], prefix: str, config: ModelConfig, x_TD: Tensor) -> Tensor:
    gate, up, down = (tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return linear(silu(linear(x_TD, gate)) * linear(x_TD, up), down)


def experts(tensors: dict[str, Tensor], prefix: str, config: ModelConfig, x_TD: Tensor) -> Tensor:
    rows = []
    for x_D in x_TD:
        logits = linear(x_D, tensors[prefix + "block_sparse_moe.gate.weight"])
        chosen = sorted(range(config.experts), key=lambda expert: (-logits[expert].item(), expert))
        chosen = chosen[: config.experts_per_token]
        total = torch.zeros_like(x_D)
        for expert, weight in zip(chosen, logits[chosen].softmax(-1), strict=True):
            w1, w2, w3 = (tensors[f"{prefix}block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
            total = total + weight * linear(silu(linear(x_D, w1)) * linear(x_D, w3), w2)
        rows.append(total)
    return torch.stack(rows)
