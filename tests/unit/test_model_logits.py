"""Logits equal transformers' on random checkpoints of every family, however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.model.decoder import Decoder
from shared.model.registry import load
from shared.model.source import resolve
from tests.model_checkpoints import random_model, reference_logits, save_and_load, tokens
from tests.model_driver import DrivenSequence, ModelDriver

TOLERANCE = 1e-4

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("LlamaForCausalLM", {"heads": 4, "kv_heads": 4}),
    "llama-mqa": ("LlamaForCausalLM", {"heads": 5, "kv_heads": 1}),
    "llama-gqa2-tied": ("LlamaForCausalLM", {"heads": 4, "kv_heads": 2, "tie_word_embeddings": True}),
    "llama-gqa3": ("LlamaForCausalLM", {"heads": 9, "kv_heads": 3, "head_dim": 8}),
    "llama-gqa4-biases": ("LlamaForCausalLM", {"heads": 8, "kv_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama-gqa7": ("LlamaForCausalLM", {"heads": 14, "kv_heads": 2, "head_dim": 10}),
    "llama-rope-linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
    ),
    "llama-rope-llama3": (
        "LlamaForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 500.0,
            },
        },
    ),
    "mistral-gqa3": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 37}),
    "qwen2-gqa3": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"heads": 4, "kv_heads": 4, "tie_word_embeddings": True}),
    "qwen3-gqa3": ("Qwen3ForCausalLM", {}),
    "qwen3-tied-biases": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    "gpt2-tied": ("GPT2LMHeadModel", {"heads": 3}),
    "gpt2-untied": ("GPT2LMHeadModel", {"heads": 3, "tie_word_embeddings": False}),
    "gpt2-inner-unscaled": ("GPT2LMHeadModel", {"n_inner": 75, "scale_attn_weights": False, "head_dim": 6}),
    "bigcode-mqa": ("GPTBigCodeForCausalLM", {"heads": 5}),
    "bigcode-mqa-untied": ("GPTBigCodeForCausalLM", {"heads": 4, "tie_word_embeddings": False}),
    "bigcode-mha": ("GPTBigCodeForCausalLM", {"heads": 4, "multi_query": False}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    architecture, settings = MODELS[request.param]
    model = random_model(architecture, **settings)
    return model, save_and_load(model, tmp_path)


def test_prefill_chunked_prefill_and_paged_decode(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    prompt = tokens(150)
    expected = reference_logits(model, prompt)
    assert expected.std() > 0.1  # a flat reference would prove nothing
    driver = ModelDriver(decoder)
    for size in (len(prompt), 47, 5):
        assert (driver.chunked(prompt, size) - expected).abs().max() <= TOLERANCE
    decoded = ModelDriver(decoder, block_size=8).chunked(prompt[:40], 1)
    assert (decoded - expected[:40]).abs().max() <= TOLERANCE


def test_mixed_step_of_chunks_and_single_tokens(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    prompts = [tokens(count, seed=count) for count in (3, 30, 77, 131, 131)]
    driver = ModelDriver(decoder, num_blocks=64)
    sequences = [DrivenSequence() for _ in prompts]
    steps = [prompts[0][:2], prompts[1][:29], prompts[2][:20], prompts[3][:100], prompts[4][:100]]
    driver.step(list(zip(sequences, steps, strict=True)))
    rest = [prompt[len(done) :] for prompt, done in zip(prompts, steps, strict=True)]
    for prompt, logits in zip(prompts, driver.logits(list(zip(sequences, rest, strict=True))), strict=True):
        expected = reference_logits(model, prompt)[-len(logits) :]
        assert (logits - expected).abs().max() <= TOLERANCE


def test_row_padding_changes_nothing_but_bits(tmp_path: Path) -> None:
    model = random_model("LlamaForCausalLM")
    decoder = save_and_load(model, tmp_path, row_pad=1)
    prompt = tokens(61)
    logits = ModelDriver(decoder).chunked(prompt, 7)
    assert decoder.row_pad == 1
    assert (logits - reference_logits(model, prompt)).abs().max() <= TOLERANCE


def test_a_long_sequence_is_gathered_in_parts_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.model.attention._GATHER_VALUES", 1)
    model = random_model("LlamaForCausalLM")
    driver = ModelDriver(save_and_load(model, tmp_path))
    prompts = [tokens(200, seed=1), tokens(200, seed=2)]
    for prompt, logits in zip(prompts, driver.logits([(DrivenSequence(), prompt) for prompt in prompts]), strict=True):
        assert (logits - reference_logits(model, prompt)).abs().max() <= TOLERANCE


def test_block_size_must_divide_the_split(tmp_path: Path) -> None:
    driver = ModelDriver(save_and_load(random_model("LlamaForCausalLM"), tmp_path), block_size=24)
    with pytest.raises(ValueError, match="does not divide 128"):
        driver.chunked(tokens(4), 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tmp_path: Path, dtype: str) -> None:
    model = random_model("Qwen3ForCausalLM")
    model.save_pretrained(tmp_path)
    decoder = load(resolve(str(tmp_path)), "cpu", dtype)
    prompt = tokens(40)
    logits = ModelDriver(decoder, kv_dtype=getattr(torch, dtype)).chunked(prompt, 9)
    expected = reference_logits(model, prompt)
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.99
