"""How fast a machine could be at most: the arithmetic behind every limit that the bench prints. Pure.

Two ceilings are measured, bytes read a second and operations a second, and a step takes at least as long as the one
and as the other: decode of few rows reads weights and hardly computes, prefill computes and hardly reads.

The model `mid` (dim 1024, 8 layers, 8 experts of which 2 are chosen, 16 heads over 4 KV heads of 64, FFN 2048,
vocabulary 32,000) in bfloat16 on a machine that reads 40 GB/s and does 800 GFLOP/s:

    weights   a layer: attention 2,621,440, gate 8,192, an expert 6,291,456; head 32,768,000
    decode    one row touches 8 x (2,621,440 + 8,192 + 2 x 6,291,456) + 32,768,000 = 154,468,352 weights = 308.9 MB,
              and at position 191 reads 192 places of 8 KiB of keys and values = 1.6 MB:
              310.5 MB / 40 GB/s = 7.76 ms, 129 tokens a second; the arithmetic would take 0.4 ms
    experts   32 rows that choose evenly leave an expert untouched with probability (1 - 2/8)^32 = 0.0001, 8 rows with
              0.1, one row with 0.75: so 8.0, 7.2 and 2.0 of 8 are read
    prefill   a row does 2 x 8 x (2,621,440 + 8,192 + 2 x 6,291,456) = 243.4 MFLOP and 4 x 16 x 64 x 8 = 32,768 a key
              that it sees; 4,096 rows see 8,390,656 keys: 997.0 + 274.9 GFLOP, and the last row's head: 1.59 s

What is left out is small: norms, embeddings, activations, sampling, writing keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tramontane.stages.config import ModelConfig

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 34 / 32}
"""int8: 32 weights share a scale of 2 bytes."""
KV_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a machine did at best, just now, with the threads that the contestants have."""

    read_gb_s: float
    """Bytes read from memory, far more than the caches hold."""
    float32_gflop_s: float
    bfloat16_gflop_s: float
    """... of products of matrices."""
    int8_gflop_s: float = 0.0
    """0 where it was not measured."""

    def gflop_s(self, dtype: str) -> float:
        """The rate that bounds a model of that dtype: a CPU slow at it may compute with wider numbers.

        >>> Ceilings(read_gb_s=20, float32_gflop_s=150, bfloat16_gflop_s=25).gflop_s("bfloat16")
        150
        """
        wider = {
            "float32": (self.float32_gflop_s,),
            "bfloat16": (self.bfloat16_gflop_s, self.float32_gflop_s),
            "int8": (self.int8_gflop_s, self.bfloat16_gflop_s, self.float32_gflop_s),
        }
        return max(wider[dtype])

    def mean(self, other: Ceilings) -> Ceilings:
        """For what was measured between the two."""
        mine, theirs = vars(self), vars(other)
        return Ceilings(**{name: (mine[name] + theirs[name]) / 2 for name in mine})


@dataclass(frozen=True)
class Cost:
    """What something reads and computes."""

    bytes: float
    operations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, ceilings: Ceilings, dtype: str) -> float:
        """At least: the longer of reading and computing."""
        return max(self.bytes / (ceilings.read_gb_s * 1e9), self.operations / (ceilings.gflop_s(dtype) * 1e9))

    def serial_s(self, ceilings: Ceilings, dtype: str) -> float:
        """Reading first and computing then: what it takes where nothing overlaps."""
        return self.bytes / (ceilings.read_gb_s * 1e9) + self.operations / (ceilings.gflop_s(dtype) * 1e9)

    def bound(self, ceilings: Ceilings, dtype: str) -> str:
        """Which of the two it is."""
        reading = self.bytes / ceilings.read_gb_s >= self.operations / ceilings.gflop_s(dtype)
        return "reads" if reading else "arithmetic"


@dataclass(frozen=True)
class Weights:
    """Parameters of a model's parts, norms left out."""

    attention: int
    """A layer's four products."""
    gate: int
    """0 in a dense model."""
    expert: int
    """Three products of one expert, or of the dense FFN."""
    head: int


def weights(config: ModelConfig) -> Weights:
    """Count them."""
    attention = config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    gate = config.dim * config.experts
    return Weights(attention, gate, 3 * config.dim * config.ffn_dim, config.dim * config.vocab)


def parameters(config: ModelConfig) -> int:
    """All of them: norms and embedding, too."""
    each, experts = weights(config), config.experts or 1
    layer = each.attention + each.gate + experts * each.expert + 2 * config.dim
    return config.layers * layer + config.dim + each.head * (1 if config.tied else 2)


def experts_touched(config: ModelConfig, rows: int) -> float:
    """Experts of a layer that so many rows are expected to touch if each chooses evenly; 1 in a dense model."""
    if not config.experts:
        return 1.0
    return config.experts * (1 - (1 - config.experts_per_token / config.experts) ** rows)


def keys_seen(config: ModelConfig, first: int, rows: int) -> int:
    """Keys that the rows at positions first .. first + rows see, over all layers.

    >>> from tramontane.stages.config import EXAMPLE        # 4 layers, window 8
    >>> keys_seen(EXAMPLE, 0, 3), keys_seen(EXAMPLE, 6, 3)
    (24, 92)
    """
    total = 0
    for window in config.windows:
        growing = rows if window is None else min(max(window - first, 0), rows)  # those that see all before them
        total += growing * first + growing * (growing + 1) // 2 + (rows - growing) * (window or 0)
    return total


def kv_place_bytes(config: ModelConfig, dtype: str) -> int:
    """One position's key and value in one layer."""
    return 2 * config.kv_heads * config.head_dim * KV_BYTES["bfloat16" if dtype == "int8" else dtype]


def attention_cost(config: ModelConfig, keys: int, dtype: str, *, reread: bool) -> Cost:
    """Scores and weighted sums over so many (row, key) pairs; `reread` where every row reads keys of its own."""
    per_key = 4.0 * config.heads * config.head_dim
    return Cost(keys * kv_place_bytes(config, dtype) if reread else 0.0, keys * per_key)


def decode_cost(config: ModelConfig, positions: Sequence[int], dtype: str, experts: float | None = None) -> Cost:
    """One step of a row at each of these positions. `experts` of each layer are touched; default: as expected."""
    each, rows = weights(config), len(positions)
    touched = experts_touched(config, rows) if experts is None else experts
    read = config.layers * (each.attention + each.gate + touched * each.expert) + each.head
    work = rows * (config.layers * (each.attention + each.gate + _chosen(config) * each.expert) + each.head)
    keys = sum(keys_seen(config, position, 1) for position in positions)
    return Cost(read * WEIGHT_BYTES[dtype], 2.0 * work) + attention_cost(config, keys, dtype, reread=True)


def prefill_cost(config: ModelConfig, lengths: Sequence[int], dtype: str) -> Cost:
    """Whole prompts, each with one sampled row. Weights are read once."""
    each = weights(config)
    work = sum(lengths) * config.layers * (each.attention + each.gate + _chosen(config) * each.expert)
    read = config.layers * (each.attention + each.gate + (config.experts or 1) * each.expert) + each.head
    keys = sum(keys_seen(config, 0, length) for length in lengths)
    products = Cost(read * WEIGHT_BYTES[dtype], 2.0 * (work + len(lengths) * each.head))
    return products + attention_cost(config, keys, dtype, reread=False)


def _chosen(config: ModelConfig) -> int:
    return config.experts_per_token or 1


@dataclass(frozen=True)
class Floor:
    """The least time that a workload can take."""

    prefill_s: float
    decode_s: float
    decode_bound: str
    """What bounds most of its decode: reads or arithmetic."""

    def tokens_per_s(self, counted: str, tokens: int) -> float:
        """The most that the figure of so many counted tokens can be."""
        seconds = {"whole": self.prefill_s + self.decode_s, "decode": self.decode_s, "prefill": self.prefill_s}
        return tokens / seconds[counted]


def floor(
    config: ModelConfig,
    lengths: Sequence[int],
    new_tokens: int,
    ceilings: Ceilings,
    dtype: str,
    experts: float | None = None,
) -> Floor:
    """Prompts of these lengths are prefilled, each with its first token, then all decode together to the end.

    The last token that is generated is never fed, so `new_tokens` take that many steps less one.
    """
    steps = [
        decode_cost(config, [length + step for length in lengths], dtype, experts) for step in range(new_tokens - 1)
    ]
    decode_s = sum(step.seconds(ceilings, dtype) for step in steps)
    bound = steps[len(steps) // 2].bound(ceilings, dtype) if steps else ""
    return Floor(prefill_cost(config, lengths, dtype).seconds(ceilings, dtype), decode_s, bound)
