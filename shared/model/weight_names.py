"""Where each family keeps its weights: a literal table from architecture to tensor names. Imports no torch.

To add a family: a reader in `hf_config` (and an entry in `gguf_config`), and an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import ModelFormatError
from shared.model.config import refuse_architecture


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Tensor names of one family, without ".weight" / ".bias"; `{i}` is the layer.

    `qkv` and `mlp_in` are one fused matrix or its parts in order (q, k, v; gate, up). `transposed`: linear weights
    are stored [in, out]. `interleaved`: q/k rows are stored so that rotary pairs are neighbours, as llama.cpp does.
    `per_head_qkv`: a fused qkv matrix with as many K/V heads as heads holds q, k, v head by head.
    `optional_prefix` may or may not stand before the names.
    """

    embedding: str
    final_norm: str
    lm_head: str
    attn_norm: str
    qkv: tuple[str, ...]
    attn_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    positions: str = ""
    q_norm: str = ""
    k_norm: str = ""
    rope_factors: str = ""
    transposed: bool = False
    interleaved: bool = False
    per_head_qkv: bool = False
    optional_prefix: str = ""


_LLAMA = WeightNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    lm_head="lm_head",
    attn_norm="model.layers.{i}.input_layernorm",
    qkv=(
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    attn_out="model.layers.{i}.self_attn.o_proj",
    mlp_norm="model.layers.{i}.post_attention_layernorm",
    mlp_in=("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    mlp_out="model.layers.{i}.mlp.down_proj",
    q_norm="model.layers.{i}.self_attn.q_norm",
    k_norm="model.layers.{i}.self_attn.k_norm",
)


def _gpt(*, transposed: bool, per_head_qkv: bool) -> WeightNames:
    return WeightNames(
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
        lm_head="lm_head",
        attn_norm="h.{i}.ln_1",
        qkv=("h.{i}.attn.c_attn",),
        attn_out="h.{i}.attn.c_proj",
        mlp_norm="h.{i}.ln_2",
        mlp_in=("h.{i}.mlp.c_fc",),
        mlp_out="h.{i}.mlp.c_proj",
        transposed=transposed,
        per_head_qkv=per_head_qkv,
        optional_prefix="transformer.",
    )


def _gguf(*, gated: bool, interleaved: bool) -> WeightNames:
    if gated:
        qkv: tuple[str, ...] = ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v")
        mlp_in: tuple[str, ...] = ("blk.{i}.ffn_gate", "blk.{i}.ffn_up")
    else:
        qkv, mlp_in = ("blk.{i}.attn_qkv",), ("blk.{i}.ffn_up",)
    return WeightNames(
        embedding="token_embd",
        positions="position_embd",
        final_norm="output_norm",
        lm_head="output",
        attn_norm="blk.{i}.attn_norm",
        qkv=qkv,
        attn_out="blk.{i}.attn_output",
        mlp_norm="blk.{i}.ffn_norm",
        mlp_in=mlp_in,
        mlp_out="blk.{i}.ffn_down",
        q_norm="blk.{i}.attn_q_norm",
        k_norm="blk.{i}.attn_k_norm",
        rope_factors="rope_freqs",
        interleaved=interleaved,
    )


HF_WEIGHTS: dict[str, WeightNames] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _gpt(transposed=True, per_head_qkv=False),
    "GPTBigCodeForCausalLM": _gpt(transposed=False, per_head_qkv=True),
}

GGUF_WEIGHTS: dict[str, WeightNames] = {
    "LlamaForCausalLM": _gguf(gated=True, interleaved=True),
    "Qwen2ForCausalLM": _gguf(gated=True, interleaved=False),
    "Qwen3ForCausalLM": _gguf(gated=True, interleaved=False),
    "GPT2LMHeadModel": _gguf(gated=False, interleaved=False),
    "GPTBigCodeForCausalLM": _gguf(gated=False, interleaved=False),
}

_TABLES = {"hf": HF_WEIGHTS, "gguf": GGUF_WEIGHTS}


def weight_names(kind: str, architecture: str) -> WeightNames:
    """Names for a source of `kind` "hf" or "gguf". Raises ModelFormatError listing the architectures known."""
    table = _TABLES.get(kind)
    if table is None:
        raise ModelFormatError(f"{kind!r} is not a kind of model file; known are {', '.join(_TABLES)}.")
    if architecture not in table:
        raise refuse_architecture(architecture, list(table))
    return table[architecture]
