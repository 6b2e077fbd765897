"""From GGUF metadata to a `ModelConfig`: a literal table, one entry a family. Imports no torch.

Keys and their meaning: the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import ModelFormatError
from shared.model.config import NORM_LAYER, NORM_RMS, ModelConfig, RopeScaling, refuse_architecture

Metadata = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Family:
    architecture: str
    rotary: bool
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", rotary=True),
    "qwen2": _Family("Qwen2ForCausalLM", rotary=True, qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", rotary=True, qk_norm=True),
    "gpt2": _Family("GPT2LMHeadModel", rotary=False, qkv_bias=True),
    "starcoder": _Family("GPTBigCodeForCausalLM", rotary=False, qkv_bias=True),
}


def from_gguf(metadata: Metadata) -> ModelConfig:
    """Read GGUF metadata. Whether the head is tied shows in the tensors only: `source` fills that in.

    Raises ModelFormatError naming the key, or listing the architectures known.
    """
    name = metadata.get("general.architecture")
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise refuse_architecture(name, list(_FAMILIES))
    key = f"{name}."
    if metadata.get(key + "expert_count"):
        raise ModelFormatError("expert_count is set: mixture-of-experts models are not supported.")
    hidden_size = _int(metadata, key + "embedding_length")
    num_heads = _int(metadata, key + "attention.head_count")
    head_dim = _int(metadata, key + "attention.key_length", hidden_size // max(num_heads, 1))
    if _int(metadata, key + "attention.value_length", head_dim) != head_dim:
        raise ModelFormatError("keys and values of different length are not supported.")
    if family.rotary and _int(metadata, key + "rope.dimension_count", head_dim) != head_dim:
        raise ModelFormatError("rotary positions over a part of each head are not supported.")
    norm = "attention.layer_norm_rms_epsilon" if family.rotary else "attention.layer_norm_epsilon"
    default_kv_heads = 1 if name == "starcoder" else num_heads
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=_vocab_size(metadata, key),
        hidden_size=hidden_size,
        intermediate_size=_int(metadata, key + "feed_forward_length"),
        num_layers=_int(metadata, key + "block_count"),
        num_heads=num_heads,
        num_kv_heads=_int(metadata, key + "attention.head_count_kv", default_kv_heads),
        head_dim=head_dim,
        max_position=_int(metadata, key + "context_length"),
        norm=NORM_RMS if family.rotary else NORM_LAYER,
        norm_eps=_float(metadata, key + norm, 1e-5),
        activation="silu" if family.rotary else "gelu_tanh",
        gated_mlp=family.rotary,
        rope_theta=_float(metadata, key + "rope.freq_base", 10000.0) if family.rotary else None,
        rope_scaling=_rope_scaling(metadata, key) if family.rotary else None,
        qkv_bias=family.qkv_bias,
        attn_out_bias=not family.rotary,
        mlp_bias=not family.rotary,
        qk_norm=family.qk_norm,
        sliding_window=_int(metadata, key + "attention.sliding_window", 0) or None,
        eos_ids=eos_ids(metadata),
        bos_id=_int(metadata, "tokenizer.ggml.bos_token_id", -1) if "tokenizer.ggml.bos_token_id" in metadata else None,
        dtype="float32",
    )


def eos_ids(metadata: Metadata) -> tuple[int, ...]:
    """Every id that ends a text or a turn, in a fixed order without repetition."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return tuple(dict.fromkeys(_int(metadata, key) for key in keys if key in metadata))


def _int(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFormatError(f"GGUF key {key} is {value!r}; it must be a whole number.")
    return value


def _float(metadata: Metadata, key: str, default: float) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelFormatError(f"GGUF key {key} is {value!r}; it must be a number.")
    return float(value)


def _vocab_size(metadata: Metadata, key: str) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else _int(metadata, key + "vocab_size")


def _rope_scaling(metadata: Metadata, key: str) -> RopeScaling | None:
    kind = metadata.get(key + "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", _float(metadata, key + "rope.scaling.factor", 1.0))
    raise ModelFormatError(f"GGUF rope scaling {kind!r} is not supported; supported are none and linear.")
