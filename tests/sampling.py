"""Rows to sample, and a dumb numpy sampler that follows the stated order literally."""

import numpy as np

from tramontane.stages.microbatch import SampledRows


def options(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, banned=None):
    """Sampled rows; an option is one value for all rows or one a row. `banned` is one list of ids a row."""

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (rows,)).copy()

    banned = banned or [[] for _ in range(rows)]
    return SampledRows(
        row=np.arange(rows, dtype=np.int32),
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        seed=column(seed, np.uint64),
        banned=np.array([token for ids in banned for token in ids], np.int32),
        banned_count=np.array([len(ids) for ids in banned], np.int32),
    )


def alone(rows, index):
    """One row of several."""
    ends = np.cumsum(rows.banned_count)
    return options(
        1,
        temperature=rows.temperature[index],
        top_k=rows.top_k[index],
        top_p=rows.top_p[index],
        min_p=rows.min_p[index],
        seed=rows.seed[index],
        banned=[rows.banned[ends[index] - rows.banned_count[index] : ends[index]].tolist()],
    )


def positions(rows, first=0):
    return np.arange(first, first + rows, dtype=np.int32)


def dumb_distribution(logits, temperature, top_k, top_p, min_p, banned=()):
    """Probabilities of one row, float64, id by id; also how near a filter came to deciding otherwise."""
    ids = len(logits)
    values = [-np.inf if token in banned else float(logits[token]) for token in range(ids)]
    best = max(values)
    weights = [np.exp((value - best) / temperature) for value in values]
    total = sum(weights)
    probability = [weight / total for weight in weights]
    ranked = sorted(range(ids), key=lambda token: (-probability[token], token))
    margin = 1.0
    kept = ranked[:top_k] if top_k else ranked
    if top_p < 1:
        mass, nucleus = 0.0, []
        for token in kept:
            if nucleus:
                margin = min(margin, abs(mass - top_p))
            if not nucleus or mass < top_p:
                nucleus.append(token)
            mass += probability[token]
        kept = nucleus
    if min_p:
        floor = min_p * probability[ranked[0]]
        # An id that equals the floor exactly is decided exactly: min_p is 1, and it ties with the likeliest.
        gaps = [abs(probability[token] - floor) for token in kept]
        margin = min([margin, *(gap for gap in gaps if gap)])
        kept = [token for token in kept if probability[token] >= floor]
    mass = sum(probability[token] for token in kept)
    return np.array([probability[token] / mass if token in kept else 0.0 for token in range(ids)]), margin


def dumb_draw(probability, noise):
    """The id at which the cumulative probability passes the noise; None where rounding could decide."""
    cumulative = np.cumsum(probability)
    if np.abs(cumulative - noise).min() < 1e-5:
        return None
    return int(np.argmax(cumulative > noise))
