"""The differentiable twin of what `stages/` serves: a Mixtral decoder for training, with its losses.

B sequences, T positions, D dim, H query heads, K KV heads, d head_dim, E experts, F FFN dim, k experts per token,
N = B x T tokens, V vocabulary. Parameters bear Hugging Face's names, except that a layer's experts are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's shape. The defaults are the embedded model's: about 7 million parameters, 3 million active."""

    vocab: int = 1024
    dim: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 112
    experts: int = 8
    experts_per_token: int = 2
    window: int = 128
    context: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1


class Routing(NamedTuple):
    """One layer's choice of experts."""

    probability_NE: Tensor
    """Softmax over all experts; the balance loss needs it."""
    chosen_Nk: Tensor
    """The experts that each token goes to."""


class Attention(nn.Module):
    """Grouped-query attention over a sliding window."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, width, bias=False)
        self.k_proj = nn.Linear(shape.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.dim, bias=False)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_TT: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, _ = x_BTD.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        q_BHTd, k_BKTd, v_BKTd = (heads(project(x_BTD)) for project in (self.q_proj, self.k_proj, self.v_proj))
        group = self.shape.heads // self.shape.kv_heads
        mixed_BHTd = F.scaled_dot_product_attention(
            rotate(q_BHTd, rope),
            rotate(k_BKTd, rope).repeat_interleave(group, dim=1),
            v_BKTd.repeat_interleave(group, dim=1),
            attn_mask=visible_TT,
        )
        return torch.as_tensor(self.o_proj(mixed_BHTd.transpose(1, 2).reshape(batch, length, -1)))


class Experts(nn.Module):
    """A gate and its experts: the k highest gate logits, softmaxed over the chosen (Mixtral, section 2.1)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.dim, shape.experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(shape.experts, shape.ffn_dim, shape.dim))
        self.w2 = nn.Parameter(torch.empty(shape.experts, shape.dim, shape.ffn_dim))
        self.w3 = nn.Parameter(torch.empty(shape.experts, shape.ffn_dim, shape.dim))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D], and which experts were chosen."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.gate(x_ND)
        top_Nk, chosen_Nk = logits_NE.topk(self.shape.experts_per_token)
        weight_Nk = top_Nk.softmax(-1)
        order = chosen_Nk.flatten().argsort(stable=True)
        token, counts = (
            order // self.shape.experts_per_token,
            chosen_Nk.flatten().bincount(minlength=self.shape.experts),
        )
        parts = [
            (F.silu(part @ w1.T) * (part @ w3.T)) @ w2.T
            for part, w1, w2, w3 in zip(
                x_ND.index_select(0, token).split(counts.tolist()), self.w1, self.w2, self.w3, strict=True
            )
        ]
        weighted = torch.cat(parts) * weight_Nk.flatten()[order, None]
        out_ND = torch.zeros_like(x_ND).index_add(0, token, weighted)
        return out_ND.view_as(x_BTD), Routing(logits_NE.softmax(-1), chosen_Nk)


class Layer(nn.Module):
    """Norm, attention, norm, experts, with residuals and dropout on each branch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.block_sparse_moe = Experts(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_TT: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D], and which experts were chosen."""
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rope, visible_TT))
        mixed_BTD, routing = self.block_sparse_moe(self.post_attention_layernorm(x_BTD))
        return x_BTD + self.dropout(mixed_BTD), routing


class TrainingModel(nn.Module):
    """The decoder; its head is its embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        depth = (2 * shape.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # residual branches start smaller (GPT-2, section 2.3)
                nn.init.normal_(parameter, std=0.02 * (depth if name.endswith(("o_proj.weight", "w2")) else 1.0))

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        """Token ids [B, T] -> logits [B, T, V], and each layer's routing."""
        positions = torch.arange(tokens_BT.shape[1])
        distance_TT = positions[:, None] - positions[None, :]
        visible_TT = (distance_TT >= 0) & (distance_TT < self.shape.window)
        rope = rope_table(positions, self.shape)
        x_BTD = self.dropout(self.embed_tokens(tokens_BT))
        routings = []
        for layer in self.layers:
            x_BTD, routing = layer(x_BTD, rope, visible_TT)
            routings.append(routing)
        return F.linear(self.norm(x_BTD), self.embed_tokens.weight), routings


def rope_table(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, d] of rotary positions (RoFormer, section 3.2.2) in the rotate-half layout."""
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle_Td = (positions[:, None] * inverse[None, :]).repeat(1, 2)
    return angle_Td.cos(), angle_Td.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the last axis by its position's angle. [..., T, d]"""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]


def balance_loss(routings: list[Routing], sequences: int) -> Tensor:
    """Sum over the sequences of E x sum_e (share of e's assignments) x (mean probability of e), mean over the layers.

    Switch Transformers, section 2.2, equation 4. It is a product of means, so over a whole batch it would depend on
    how the batch is cut; taken for each sequence and summed, it does not. 1 a sequence is perfect balance.
    """
    losses = []
    for probability_NE, chosen_Nk in routings:
        experts = probability_NE.shape[1]
        chosen_BTk = chosen_Nk.view(sequences, -1, chosen_Nk.shape[1])
        share_BE = F.one_hot(chosen_BTk, experts).float().mean((1, 2))
        mean_BE = probability_NE.view(sequences, -1, experts).mean(1)
        losses.append(experts * (share_BE * mean_BE).sum())
    return torch.stack(losses).mean()


def accumulate_gradients(model: TrainingModel, tokens_BT: Tensor, *, microbatches: int, balance: float) -> float:
    """Add the batch's gradients to the model's, one microbatch of sequences at a time; the mean token loss, in nats.

    Every loss is a sum over sequences, divided by the whole batch's count, so that any number of microbatches gives the
    same gradients up to rounding. `tokens_BT` holds inputs and targets: T - 1 tokens a sequence are predicted.
    """
    sequences, length = tokens_BT.shape
    total = 0.0
    for part_BT in tokens_BT.chunk(microbatches):
        logits_BTV, routings = model(part_BT[:, :-1])
        token_loss = F.cross_entropy(logits_BTV.flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum")
        token_loss = token_loss / (sequences * (length - 1))
        (token_loss + balance * balance_loss(routings, len(part_BT)) / sequences).backward()
        total += token_loss.item()
    return total


def hugging_face_tensors(model: TrainingModel) -> dict[str, Tensor]:
    """The parameters under the names of a Hugging Face Mixtral checkpoint, in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith((".w1", ".w2", ".w3")):
            stem, matrix = name.rsplit(".", 1)
            tensors |= {f"model.{stem}.experts.{index}.{matrix}.weight": expert for index, expert in enumerate(value)}
        else:
            tensors[f"model.{name}"] = value
    return {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
