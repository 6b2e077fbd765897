"""In which order the rows of stored matrices are computed: heads side by side, rotary pairs as neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.kernels.packing import TILE
from shared.model.config import ModelConfig
from shared.model.weight_names import WeightNames

Int64 = npt.NDArray[np.int64]


def rotary_order(config: ModelConfig, names: WeightNames) -> Int64:
    """Places of one head's dimensions such that rotary pairs are neighbours."""
    dims = np.arange(config.head_dim)
    if config.rope_theta is not None and not names.interleaved:
        dims = dims.reshape(2, -1).T.reshape(-1)
    return dims


def qkv_order(config: ModelConfig, names: WeightNames) -> Int64:
    """Rows of the stored q, k and v matrices, one below the other, in the decoder's order."""
    num_heads, num_kv = config.num_heads, config.num_kv_heads
    if names.per_head_qkv and num_heads == num_kv:
        heads = np.arange(3 * num_heads).reshape(num_heads, 3).T.reshape(-1)
    else:
        heads = np.arange(num_heads + 2 * num_kv)
    order = heads[:, None] * config.head_dim + np.arange(config.head_dim)
    rotated = num_heads + num_kv
    order[:rotated] = heads[:rotated, None] * config.head_dim + rotary_order(config, names)
    return order.reshape(-1)


def gate_and_up_order(size: int) -> Int64:
    """16 rows of gate and 16 rows of up in turn, from gate above up, each `size` rows."""
    return np.arange(2 * size).reshape(2, size // TILE, TILE).transpose(1, 0, 2).reshape(-1)
