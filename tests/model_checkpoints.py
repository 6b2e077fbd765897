"""Small random checkpoints: through transformers, and as GGUF files through the gguf package's writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers

from shared.model.decoder import Decoder
from shared.model.registry import load
from shared.model.source import resolve

VOCAB_SIZE = 131
MAX_POSITION = 512

_ROTARY = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}
_LEARNED = {"GPT2LMHeadModel": transformers.GPT2Config, "GPTBigCodeForCausalLM": transformers.GPTBigCodeConfig}


def random_model(
    architecture: str, *, heads: int = 6, kv_heads: int = 2, head_dim: int = 16, layers: int = 2, **settings: Any
) -> transformers.PreTrainedModel:
    """A transformers model with random weights everywhere, biases and norms included, large enough to matter."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2}
    if architecture in _ROTARY:
        sizes |= {"hidden_size": 10 * heads, "intermediate_size": 84, "num_hidden_layers": layers, "head_dim": head_dim}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        sizes |= {"max_position_embeddings": MAX_POSITION}
        config = _ROTARY[architecture](**(sizes | settings))
    else:
        sizes |= {"n_embd": heads * head_dim, "n_head": heads, "n_layer": layers, "n_positions": MAX_POSITION}
        config = _LEARNED[architecture](**(sizes | settings))
    torch.manual_seed(3)
    model: transformers.PreTrainedModel = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3 if parameter.dim() == 1 else 0.15)
    return model


def save_and_load(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Decoder:
    """Through a safetensors folder into our decoder, float32 on the CPU."""
    model.save_pretrained(folder)
    return load(resolve(str(folder)), "cpu", "float32", **options)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


def reference_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits [num_tokens, vocab_size] of one whole forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def permute_for_llama_cpp(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from rotated halves to neighbouring pairs, as GGUF files of the llama family store them."""
    head_dim = len(weight) // heads
    halves = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_llama_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    quantised: dict[str, tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]] | None = None,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Write a transformers Llama model as GGUF.

    `quantised` replaces tensors by raw bytes of a type, `extra` adds or replaces tensors, `without` leaves some out.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    tensors = llama_gguf_tensors(state, config) | (extra or {})
    for name, tensor in tensors.items():
        if name in without:
            continue
        raw, kind = (quantised or {}).get(name, (tensor, gguf.GGMLQuantizationType.F32))
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_gguf_tensors(state: dict[str, torch.Tensor], config: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of a Llama model under their GGUF names, q and k permuted."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"].numpy(),
        "output_norm.weight": state["model.norm.weight"].numpy(),
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"].numpy()
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            tensor = state[f"model.layers.{layer}.{theirs}.weight"].numpy()
            if ours in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if ours == "attn_q" else config.num_key_value_heads
                tensor = permute_for_llama_cpp(tensor, heads)
            tensors[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(tensor)
    return tensors
