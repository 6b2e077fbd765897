"""The decoder on the CPU kernels: the numbers of transformers, and the same bits whatever runs beside a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from shared.kernels.library import Isa
from shared.kv.layout import KVLayout
from shared.model.batch import RaggedStep
from shared.model.invariance import numerics_fingerprint, probe
from shared.model.native_support import why_not
from shared.model.registry import load
from shared.model.source import resolve
from tests.invariance_checks import (
    ROW_COUNTS,
    check_chunks,
    check_every_row_of_every_row_count,
    check_mixed_steps,
    same_bits,
)
from tests.model_checkpoints import (
    MAX_POSITION,
    VOCAB_SIZE,
    llama_gguf_tensors,
    random_model,
    reference_logits,
    tokens,
    write_llama_gguf,
)
from tests.model_driver import DrivenSequence, ModelDriver
from tests.native_models import isas, native

_LLAMA = {"head_dim": 16, "intermediate_size": 84}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("LlamaForCausalLM", {"heads": 4, "kv_heads": 4, "hidden_size": 64, **_LLAMA}),
    "gqa2": ("LlamaForCausalLM", {"heads": 4, "kv_heads": 2, "hidden_size": 64, **_LLAMA}),
    "gqa3": ("LlamaForCausalLM", {"heads": 6, "kv_heads": 2, "hidden_size": 96, **_LLAMA}),
    "gqa4-head80": ("LlamaForCausalLM", {"heads": 8, "kv_heads": 2, "hidden_size": 64, "head_dim": 80}),
    "gqa8": ("LlamaForCausalLM", {"heads": 8, "kv_heads": 1, "hidden_size": 32, "head_dim": 16}),
    "gqa7-tied": ("LlamaForCausalLM", {"heads": 14, "kv_heads": 2, "hidden_size": 224, "tie_word_embeddings": True}),
    "mistral-window": ("MistralForCausalLM", {"heads": 4, "kv_heads": 2, "hidden_size": 64, "sliding_window": 37}),
    "qwen2-bias": ("Qwen2ForCausalLM", {"heads": 6, "kv_heads": 2, "hidden_size": 96, "head_dim": 16}),
    "qwen3-norms": ("Qwen3ForCausalLM", {"heads": 6, "kv_heads": 2, "hidden_size": 96, "head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"heads": 4, "head_dim": 16, "n_inner": 203}),
    "bigcode-mqa": ("GPTBigCodeForCausalLM", {"heads": 6, "head_dim": 16, "n_inner": 99}),
}
_ONE = "gqa3"


def saved(name: str, folder: Path) -> Path:
    architecture, settings = MODELS[name]
    random_model(architecture, **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    architecture, settings = MODELS[name]
    model = random_model(architecture, **settings)
    model.save_pretrained(tmp_path)
    prompt = tokens(300)
    decoder = native(tmp_path, threads=2)
    found = ModelDriver(decoder).logits([(DrivenSequence(), prompt)])[0]
    torch.testing.assert_close(found, reference_logits(model, prompt), rtol=0, atol=2e-4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_stay_close(quantization: str, tmp_path: Path) -> None:
    """Against torch on the weights as they were: the errors are those of random weights, 8 and 4 bits wide."""
    folder = saved(_ONE, tmp_path)
    prompt = tokens(100)
    exact = ModelDriver(load(resolve(str(folder)), "cpu", "float32")).logits([(DrivenSequence(), prompt)])[0]
    found = ModelDriver(native(folder, quantization=quantization)).logits([(DrivenSequence(), prompt)])[0]
    error = ((found - exact).std() / exact.std()).item()
    assert error < {"int8": 0.08, "int4": 0.7}[quantization]
    assert error > 1e-4  # else nothing was quantised


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    kv_dtype: str, quantization: str | None, tmp_path: Path
) -> None:
    folder, prompt = saved(_ONE, tmp_path), tokens(290)
    found = [
        ModelDriver(
            native(folder, isa=isa, threads=threads, kv_dtype=kv_dtype, quantization=quantization),
            kv_dtype=getattr(torch, kv_dtype),
        ).chunked(prompt, size)
        for isa, threads, size in [*((isa, 1, 290) for isa in isas()), (isas()[-1], 3, 290), (isas()[-1], 3, 7)]
    ]
    for other in found[1:]:
        assert same_bits(other, found[0])


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_every_row_count(name: str, tmp_path: Path) -> None:
    decoder = native(saved(name, tmp_path), threads=2, quantization="int4" if name == _ONE else None)
    prompts = [tokens(1 + 5 * index % 167, seed=index) for index in ROW_COUNTS]
    check_every_row_of_every_row_count(decoder, prompts)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_mixed_steps(name: str, tmp_path: Path) -> None:
    decoder = native(saved(name, tmp_path), threads=2, quantization="int8" if name == _ONE else None)
    check_chunks(decoder, tokens(280))
    check_mixed_steps(decoder, [tokens(length, seed=length) for length in (1, 4, 63, 129, 130, 200)], seed=11)


@pytest.mark.parametrize(("kv_dtype", "most"), [(torch.bfloat16, 0.01), (torch.int8, 0.04)])
def test_a_lossy_cache_is_read_back_rounded(kv_dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    folder, prompt = saved(_ONE, tmp_path), tokens(200)
    rounding = native(folder, kv_dtype=str(kv_dtype).removeprefix("torch."))
    check_chunks(rounding, prompt, kv_dtype)
    exact = ModelDriver(native(folder)).chunked(prompt, len(prompt))
    rounded = ModelDriver(rounding, kv_dtype=kv_dtype).chunked(prompt, len(prompt))
    assert 1e-5 < ((rounded - exact).std() / exact.std()).item() < most


def test_int8_rows_hold_the_values_in_steps_of_their_own_scale(tmp_path: Path) -> None:
    folder, prompt = saved(_ONE, tmp_path), tokens(40)
    exact, rounding = ModelDriver(native(folder)), ModelDriver(native(folder, kv_dtype="int8"), kv_dtype=torch.int8)
    for driver in (exact, rounding):  # both give out the same blocks
        driver.chunked(prompt, len(prompt))
    for side in range(2):  # the first layer's keys and values depend on no cache
        values, rows = exact.cache[0, :, side], rounding.cache[0, :, side]
        if side == 0:
            values = values.reshape(*values.shape[:2], values.shape[3], values.shape[2])
            rows = rows.reshape(*rows.shape[:2], rows.shape[3], rows.shape[2]).transpose(2, 3)
            values = values.transpose(2, 3)
        quants, scales = rows[..., :-4].float(), rows[..., -4:].contiguous().view(torch.float32)
        used = scales[..., 0] != scales.flatten()[0]
        assert int(used.sum()) == len(prompt) * scales.shape[1]
        assert torch.allclose(scales[used][:, 0], values[used].abs().amax(-1) / 127, rtol=1e-6)
        assert ((quants * scales - values)[used].abs() <= 0.501 * scales[used]).all()


@pytest.mark.parametrize("block_size", [32, 128])
def test_other_block_sizes_change_no_bit(block_size: int, tmp_path: Path) -> None:
    folder, prompt = saved(_ONE, tmp_path), tokens(150)
    wanted = ModelDriver(native(folder)).chunked(prompt, len(prompt))
    decoder = native(folder, block_size=block_size)
    assert same_bits(ModelDriver(decoder, block_size=block_size).chunked(prompt, 50), wanted)


def test_the_probe_passes_and_the_fingerprint_knows_the_weights_and_no_instruction_set(tmp_path: Path) -> None:
    folder = saved(_ONE, tmp_path)
    source = resolve(str(folder))
    config = source.config
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32", k_transposed=True)
    assert probe(native(folder), layout).ok
    prints = {numerics_fingerprint(native(folder, isa=isa), source, "float32") for isa in isas()}
    assert len(prints) == 1
    assert numerics_fingerprint(native(folder, quantization="int8"), source, "float32") not in prints
    assert numerics_fingerprint(load(source, "cpu", "float32"), source, "float32") not in prints


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head_dim": 12, "hidden_size": 96}, "head size 12"),
        ({"heads": 4, "kv_heads": 1, "head_dim": 16, "hidden_size": 72}, "widths 72 and 64"),
        ({"hidden_size": 60}, "widths 60"),
    ],
)
def test_a_model_the_kernels_cannot_run_is_told(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    random_model("LlamaForCausalLM", **settings).save_pretrained(tmp_path)
    assert words in why_not(resolve(str(tmp_path)), 16)


def test_a_block_size_the_kernels_cannot_read_is_told(tmp_path: Path) -> None:
    assert "block size 8" in why_not(resolve(str(saved(_ONE, tmp_path))), 8)


def test_the_best_instruction_set_is_used_unless_told() -> None:
    assert isas()[0] is Isa.SCALAR


@pytest.mark.parametrize(("token", "position"), [(-1, 0), (VOCAB_SIZE, 0), (0, -1), (0, MAX_POSITION)])
def test_an_id_or_a_position_outside_the_model_is_refused(token: int, position: int, tmp_path: Path) -> None:
    decoder = native(saved(_ONE, tmp_path))
    one = np.ones(1, dtype=np.int32)
    step = RaggedStep(
        token_ids=one * token,
        positions=one * position,
        slots=np.full(1, 16, dtype=np.int64),
        starts=np.array([0, 1], dtype=np.int32),
        block_tables=np.ones((1, 40), dtype=np.int32),
        context_lens=one,
        logit_rows=one * 0,
    )
    kv = torch.zeros((decoder.num_layers, 2, 2, decoder.config.num_kv_heads, 16, decoder.config.head_dim))
    with pytest.raises(IndexError, match="outside 0 to"):
        decoder.run(step, kv)


def test_kinds_may_differ_between_the_parts_and_layers_of_a_file(tmp_path: Path) -> None:
    """As in files of mixed quantisation: dense beside quantised, in one layer and from layer to layer."""
    model = random_model("LlamaForCausalLM", heads=6, kv_heads=2, hidden_size=96, intermediate_size=96)
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = llama_gguf_tensors(model.state_dict(), model.config)
    names = ("blk.0.attn_v.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.attn_output.weight")
    stored = {name: (gguf.quants.quantize(tensors[name], kind), kind) for name in names}
    path = tmp_path / "mixed.gguf"
    write_llama_gguf(path, model, quantised=stored)
    prompt = tokens(80)
    exact = ModelDriver(load(resolve(str(path)), "cpu", "float32")).logits([(DrivenSequence(), prompt)])[0]
    found = [ModelDriver(native(path, isa=isa, threads=2)).logits([(DrivenSequence(), prompt)])[0] for isa in isas()]
    assert ((found[0] - exact).std() / exact.std()).item() < 0.05  # the activations of four products are rounded
    assert all(same_bits(other, found[0]) for other in found[1:])
