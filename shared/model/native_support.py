"""Which models the CPU kernels can run. Imports no torch."""

from __future__ import annotations

from shared.kernels.packing import INPUT_PAD, TILE
from shared.model.source import ModelSource

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2}
"""`sl_activation` of the C interface."""

_MAX_HEAD_DIM, _MAX_GROUP = 256, 32


def why_not(source: ModelSource, block_size: int) -> str:
    """Why the kernels cannot run this model, as a clause; empty when they can."""
    config = source.config
    attention_size = config.num_heads * config.head_dim
    if config.activation not in ACTIVATIONS:
        return f"the activation {config.activation} is not among {', '.join(ACTIVATIONS)}"
    if config.head_dim % TILE or config.head_dim > _MAX_HEAD_DIM:
        return f"the head size {config.head_dim} is not a multiple of {TILE} up to {_MAX_HEAD_DIM}"
    if config.hidden_size % INPUT_PAD or attention_size % INPUT_PAD:
        return f"the widths {config.hidden_size} and {attention_size} are not both multiples of {INPUT_PAD}"
    if config.group_size > _MAX_GROUP:
        return f"{config.group_size} query heads share a K/V head, more than {_MAX_GROUP}"
    if block_size % TILE:
        return f"the KV block size {block_size} is not a multiple of {TILE}"
    return ""
