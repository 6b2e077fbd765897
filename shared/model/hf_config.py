"""From a Hugging Face `config.json` to a `ModelConfig`: a literal table, one reader a family. Imports no torch.

`auto_map` (code in the model folder) is ignored: nothing from a model folder is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared.errors import ModelFormatError
from shared.model.config import NORM_LAYER, ModelConfig, RopeScaling, refuse_architecture

Json = Mapping[str, object]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def from_hf(config: Json) -> ModelConfig:
    """Read a parsed config.json. Raises ModelFormatError naming the field, or listing the architectures known."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    reader = _READERS.get(name) if isinstance(name, str) else None
    if reader is None:
        raise refuse_architecture(name, list(_READERS))
    if config.get("quantization_config") is not None:
        raise ModelFormatError("quantization_config is set: quantised safetensors cannot be loaded; use a GGUF file.")
    return reader(str(name), config)


def token_ids(config: Json, key: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise ModelFormatError(f"{key} is {value!r}; it must be a token id or a list of token ids.")
    return tuple(values)


def _int(config: Json, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFormatError(f"{key} is {value!r}; it must be a whole number.")
    return value


def _float(config: Json, key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelFormatError(f"{key} is {value!r}; it must be a number.")
    return float(value)


def _bool(config: Json, key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelFormatError(f"{key} is {value!r}; it must be true or false.")
    return value


def _activation(config: Json, key: str, default: str) -> str:
    name = config.get(key) or default
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelFormatError(f"{key} is {name!r}; known are {', '.join(sorted(_ACTIVATIONS))}.")
    return _ACTIVATIONS[name]


def _dtype(config: Json) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _bos(config: Json) -> int | None:
    ids = token_ids(config, "bos_token_id")
    return ids[0] if ids else None


def _rope(config: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelFormatError("rope_parameters must be an object of numbers.")
    theta = _float(given, "rope_theta", _float(config, "rope_theta", 10000.0))
    if _float(given, "partial_rotary_factor", _float(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise ModelFormatError("partial_rotary_factor other than 1 is not supported.")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _float(given, "factor", 1.0))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            _float(given, "factor", 8.0),
            _float(given, "low_freq_factor", 1.0),
            _float(given, "high_freq_factor", 4.0),
            _int(given, "original_max_position_embeddings", 8192),
        )
    raise ModelFormatError(f"rope scaling {kind!r} is not supported; supported are default, linear and llama3.")


def _rotary(
    name: str,
    config: Json,
    *,
    qkv_bias: bool,
    attn_out_bias: bool,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding_window: int | None = None,
) -> ModelConfig:
    """What Llama, Mistral, Qwen2 and Qwen3 have in common."""
    hidden_size = _int(config, "hidden_size")
    num_heads = _int(config, "num_attention_heads")
    theta, scaling = _rope(config)
    return ModelConfig(
        architecture=name,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(config, "intermediate_size"),
        num_layers=_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_int(config, "num_key_value_heads", num_heads),
        head_dim=_int(config, "head_dim", hidden_size // max(num_heads, 1)),
        max_position=_int(config, "max_position_embeddings", 2048),
        norm_eps=_float(config, "rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_act", "silu"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        attn_out_bias=attn_out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=_bool(config, "tie_word_embeddings", False),
        sliding_window=sliding_window,
        eos_ids=token_ids(config, "eos_token_id"),
        bos_id=_bos(config),
        dtype=_dtype(config),
    )


def _llama(name: str, config: Json) -> ModelConfig:
    bias = _bool(config, "attention_bias", False)
    mlp_bias = _bool(config, "mlp_bias", False)
    return _rotary(name, config, qkv_bias=bias, attn_out_bias=bias, mlp_bias=mlp_bias)


def _mistral(name: str, config: Json) -> ModelConfig:
    window = None if config.get("sliding_window", 4096) is None else _int(config, "sliding_window", 4096)
    return _rotary(name, config, qkv_bias=False, attn_out_bias=False, sliding_window=window)


def _refuse_mixed_windows(config: Json) -> None:
    if _bool(config, "use_sliding_window", False):
        raise ModelFormatError("use_sliding_window with different windows in different layers is not supported.")


def _qwen2(name: str, config: Json) -> ModelConfig:
    _refuse_mixed_windows(config)
    return _rotary(name, config, qkv_bias=True, attn_out_bias=False)


def _qwen3(name: str, config: Json) -> ModelConfig:
    _refuse_mixed_windows(config)
    bias = _bool(config, "attention_bias", False)
    head_dim = _int(config, "head_dim", 128)
    return _rotary(name, {**config, "head_dim": head_dim}, qkv_bias=bias, attn_out_bias=bias, qk_norm=True)


def _learned(name: str, config: Json, num_kv_heads: int | None, activation: str) -> ModelConfig:
    """What GPT-2 and GPT-BigCode have in common."""
    if _bool(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelFormatError("scale_attn_by_inverse_layer_idx is not supported.")
    if _bool(config, "add_cross_attention", False):
        raise ModelFormatError("add_cross_attention is not supported: only decoder-only models can be served.")
    hidden_size, num_heads = _int(config, "n_embd"), _int(config, "n_head")
    return ModelConfig(
        architecture=name,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(config, "n_inner", 4 * hidden_size),
        num_layers=_int(config, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=hidden_size // max(num_heads, 1),
        max_position=_int(config, "n_positions"),
        norm=NORM_LAYER,
        norm_eps=_float(config, "layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function", activation),
        gated_mlp=False,
        rope_theta=None,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        attention_scale=0.0 if _bool(config, "scale_attn_weights", True) else 1.0,
        tie_word_embeddings=_bool(config, "tie_word_embeddings", True),
        eos_ids=token_ids(config, "eos_token_id"),
        bos_id=_bos(config),
        dtype=_dtype(config),
    )


def _gpt2(name: str, config: Json) -> ModelConfig:
    return _learned(name, config, None, "gelu_new")


def _gpt_bigcode(name: str, config: Json) -> ModelConfig:
    num_kv_heads = 1 if _bool(config, "multi_query", True) else None
    return _learned(name, config, num_kv_heads, "gelu_pytorch_tanh")


_READERS: dict[str, Callable[[str, Json], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GPT2LMHeadModel": _gpt2,
    "GPTBigCodeForCausalLM": _gpt_bigcode,
}
