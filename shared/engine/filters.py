"""Which ids top_k, top_p and min_p leave over, decided with exact operations only.

A row of scaled logits is ranked by (value descending, id ascending). An id's weight is the integer nearest to
2⁴³·e^(value − largest value), with the exponential of `shared.engine.exact`, and sums of integers do not depend on
their order. So the kept set is the same on every machine, with any version of numpy, and in the CPU kernels
(`shared/kernels/cpu/filters.h`). Sums fit 64 bits up to 2²⁰ ids.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shared.engine.exact import F64, exponential
from shared.engine.noise import F32, Ids
from shared.protocol.sampling import SamplingParams

Weights = npt.NDArray[np.int64]

SCALE_BITS = 43
"""The weight of the largest value is 2 to this power."""

LOWEST = -31.0
"""Differences from the largest value are raised to this one, whose weight rounds to 0."""

_PIECE = 4096
"""Values weighed at a time: what lies in the processor's cache takes a third of the time."""

_PRUNING_MARGIN = 0.01  # far above what rounding can do to a weight, so pruning never decides


def is_filtered(params: SamplingParams) -> bool:
    """Whether some ids may be left out of the draw."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def surviving_ids(scaled: F32, params: SamplingParams) -> Ids:
    """Ids that pass top_k, then top_p over what is left, then min_p; ascending, never empty."""
    ids = top_k_ids(scaled, params.top_k) if params.top_k else _finite_ids(scaled)
    if not len(ids):
        return np.zeros(1, dtype=np.int64)
    values = scaled[ids].astype(np.float64)
    weights = weigh(values - values.max())
    if params.top_p < 1.0:
        kept = _nucleus(values, weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    return ids[weights >= math.ceil(params.min_p * 2.0**SCALE_BITS)]  # the best id has passed, and weighs 2⁴³


def weigh(differences: F64) -> Weights:
    """Integer weights of values from their differences to the largest one, which are not positive."""
    weights = np.empty(len(differences), dtype=np.int64)
    for begin in range(0, len(differences), _PIECE):
        piece = np.fmax(differences[begin : begin + _PIECE], LOWEST)
        weights[begin : begin + _PIECE] = np.rint(exponential(piece) * 2.0**SCALE_BITS)
    return weights


def nucleus_limit(total: int, top_p: float) -> int:
    """Ids are kept in rank order while the weight before them is below this."""
    return max(1, min(math.ceil(top_p * float(total)), total))


def top_k_ids(scaled: F32, k: int) -> Ids:
    """The first `k` finite ids by rank, ascending; `k` may exceed their number."""
    if k >= len(scaled):
        return _finite_ids(scaled)
    threshold = np.partition(scaled, len(scaled) - k)[len(scaled) - k]
    above = np.flatnonzero(scaled > threshold)
    tied = np.flatnonzero(scaled == threshold)[: k - len(above)]
    ids = np.sort(np.concatenate((above, tied))).astype(np.int64)
    return ids[scaled[ids] > -np.inf]


def _finite_ids(scaled: F32) -> Ids:
    return np.flatnonzero(scaled > -np.inf).astype(np.int64)


def _nucleus(values: F64, weights: Weights, top_p: float) -> Ids:
    """Indices, ascending, of those before which less than `top_p` of all weight lies."""
    total = int(weights.sum())
    limit = nucleus_limit(total, top_p)
    # Ids that weigh no more than an equal share of what may be left out are never needed: no use in sorting them.
    share = max((total - limit) / len(values) - 0.5, 0.5)  # before a weight is rounded
    needed = values >= values.max() + math.log(share) - SCALE_BITS * math.log(2.0) - _PRUNING_MARGIN
    indices = np.flatnonzero(needed)
    order = indices[np.argsort(-values[indices], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    return np.sort(order[before < limit])
