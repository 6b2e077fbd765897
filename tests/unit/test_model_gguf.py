"""GGUF files: what is read equals what was written, and nothing damaged gets past the header."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from shared.errors import ModelFormatError
from shared.model.gguf import TENSOR_TYPES, GGUFFile, read_header, read_metadata
from shared.model.registry import load
from shared.model.source import resolve
from tests.model_checkpoints import (
    llama_gguf_tensors,
    random_model,
    reference_logits,
    save_and_load,
    tokens,
    write_llama_gguf,
)
from tests.model_driver import ModelDriver

SIMPLE_KINDS = (Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


def k_quant_bytes(kind: Kind, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random blocks of a K-quant (the gguf package cannot quantise to these), their float16 scales made small."""
    rng = np.random.default_rng(int(kind))
    block_bytes = TENSOR_TYPES[int(kind)].block_bytes
    blocks = rng.integers(0, 256, (rows, columns // 256, block_bytes), dtype=np.uint8)
    small = np.array([0.002, 0.001], dtype="<f2").view(np.uint8)
    if kind == Kind.Q4_K:
        blocks[..., :4] = small
    else:
        blocks[..., -2:] = small[:2]
    return blocks.reshape(rows, -1)


# Loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_llama_logits_equal_transformers(tmp_path: Path, heads: int, kv_heads: int, tied: bool) -> None:
    model = random_model("LlamaForCausalLM", heads=heads, kv_heads=kv_heads, tie_word_embeddings=tied)
    write_llama_gguf(tmp_path / "tiny.gguf", model)
    source = resolve(str(tmp_path / "tiny.gguf"))
    decoder = load(source, "cpu", "float32")
    prompt = tokens(70)
    logits = ModelDriver(decoder).chunked(prompt, 33)
    assert source.config.tie_word_embeddings is tied
    assert (logits - reference_logits(model, prompt)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", [*SIMPLE_KINDS, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_quantised_model_equals_its_dequantised_twin(tmp_path: Path, kind: Kind) -> None:
    model = random_model("LlamaForCausalLM", head_dim=64, heads=4, kv_heads=2, hidden_size=256, intermediate_size=256)
    quantised, dequantised = {}, {}
    for name, tensor in llama_gguf_tensors(model.state_dict(), model.config).items():
        if tensor.ndim == 2 and name.startswith("blk"):
            raw = gguf.quants.quantize(tensor, kind) if kind in SIMPLE_KINDS else k_quant_bytes(kind, *tensor.shape)
            quantised[name] = (raw, kind)
            dequantised[name] = (gguf.quants.dequantize(raw, kind).reshape(tensor.shape), Kind.F32)
    write_llama_gguf(tmp_path / "quantised.gguf", model, quantised)
    write_llama_gguf(tmp_path / "twin.gguf", model, dequantised)
    file = GGUFFile(tmp_path / "quantised.gguf")
    for name, (expected, _) in dequantised.items():
        np.testing.assert_array_equal(file.read(name), expected)
    decoders = [load(resolve(str(tmp_path / f"{name}.gguf")), "cpu", "float32") for name in ("quantised", "twin")]
    quantised_logits, twin_logits = (ModelDriver(decoder).chunked(tokens(20), 20) for decoder in decoders)
    assert torch.equal(quantised_logits, twin_logits)
    assert twin_logits.isfinite().all()


def write_gguf(path: Path, arch: str, metadata: dict[str, int | float], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        else:
            writer.add_float32(f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "arch"), [("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3")])
def test_qwen_rows_are_not_permuted(tmp_path: Path, architecture: str, arch: str) -> None:
    model = random_model(architecture)
    config, state = model.config, model.state_dict()
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "input_layernorm": "attn_norm"}
    parts |= {"post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up"}
    parts |= {"down_proj": "ffn_down"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, tensor in state.items():
        base, kind = name.rsplit(".", 1)
        if base in outer:
            tensors[f"{outer[base]}.{kind}"] = tensor
        else:
            tensors[f"blk.{name.split('.')[2]}.{parts[base.rsplit('.', 1)[1]]}.{kind}"] = tensor
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": state["model.layers.0.self_attn.k_proj.weight"].shape[0] // config.num_key_value_heads,
        "attention.value_length": state["model.layers.0.self_attn.v_proj.weight"].shape[0]
        // config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }
    write_gguf(tmp_path / "q.gguf", arch, metadata, tensors)
    decoder = load(resolve(str(tmp_path / "q.gguf")), "cpu", "float32")
    prompt = tokens(60)
    assert (ModelDriver(decoder).chunked(prompt, 25) - reference_logits(model, prompt)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("architecture", "arch"), [("GPT2LMHeadModel", "gpt2"), ("GPTBigCodeForCausalLM", "starcoder")]
)
def test_learned_positions(tmp_path: Path, architecture: str, arch: str) -> None:
    model = random_model(architecture, heads=4)
    config = model.config
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    parts |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("transformer."):
            continue
        base, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if base in outer:
            tensors[f"{outer[base]}.{kind}"] = tensor
        else:
            _, layer, part = base.split(".", 2)
            conv = arch == "gpt2" and tensor.dim() == 2
            tensors[f"blk.{layer}.{parts[part]}.{kind}"] = tensor.t() if conv else tensor
    metadata = {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "vocab_size": config.vocab_size,
    }
    write_gguf(tmp_path / "g.gguf", arch, metadata, tensors)
    decoder = load(resolve(str(tmp_path / "g.gguf")), "cpu", "float32")
    prompt = tokens(60)
    assert (ModelDriver(decoder).chunked(prompt, 25) - reference_logits(model, prompt)).abs().max() <= 1e-4


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64, "rope_theta": 500.0}
    model = random_model("LlamaForCausalLM", rope_parameters=scaling)
    folder_decoder = save_and_load(model, tmp_path / "folder")
    plain = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    path = tmp_path / "factors.gguf"
    factors = (plain / model.model.rotary_emb.inv_freq).float().numpy()
    write_llama_gguf(path, model, extra={"rope_freqs.weight": factors})
    prompt = tokens(90)
    logits = [
        ModelDriver(item).chunked(prompt, 90) for item in (folder_decoder, load(resolve(str(path)), "cpu", "float32"))
    ]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_smollm2_metadata(tmp_path: Path) -> None:
    source = resolve("smollm2")
    metadata = read_metadata(source.path)
    theirs = gguf.GGUFReader(source.path)
    assert set(metadata) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "llama.rope.freq_base"):
        assert metadata[key] == theirs.fields[key].contents()
    assert (source.name, source.config.num_layers, source.config.group_size) == ("smollm2", 30, 3)
    assert source.generation.eos_ids == (2,)


# Damage -------------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(
    pairs: list[bytes], infos: list[bytes], data: bytes = b"", num_pairs: int | None = None, **other: Any
) -> bytes:
    """A GGUF file by hand, with any lie in it."""
    counts = (other.get("num_tensors", len(infos)), len(pairs) if num_pairs is None else num_pairs)
    header = b"GGUF" + struct.pack("<IQQ", other.get("version", 3), *counts) + b"".join(pairs + infos)
    return header + b"\0" * (-len(header) % 32) + data


HUGE = (1 << 64) - 1
ARRAY, STRING, UINT32 = 9, 8, 4
ONE = pair("a", UINT32, struct.pack("<I", 7))

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + b"\0" * 100, "letters GGUF"),
    "version": (build([], [], version=1), "version 1"),
    "big-endian": (build([], [], version=0x03000000), "little-endian"),
    "pairs": (build([ONE], [], num_pairs=HUGE), "claims .* metadata entries"),
    "tensors": (build([ONE], [], num_tensors=HUGE), "claims .* tensors"),
    "key": (build([struct.pack("<Q", HUGE)], [], b"\0" * 64), "name of"),
    "string": (build([pair("a", STRING, struct.pack("<Q", 1 << 40))], []), "ends too early"),
    "utf8": (build([pair("a", STRING, struct.pack("<Q", 1) + b"\xff")], []), "not UTF-8"),
    "array": (build([pair("a", ARRAY, struct.pack("<IQ", UINT32, 1 << 60))], []), "claims .* array items"),
    "strings": (build([pair("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))], []), "claims .* array items"),
    "strings-end": (build([pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))], [], b"\0" * 64), "inside a string"),
    "strings-tail": (
        build([pair("a", ARRAY, struct.pack("<IQQ", STRING, 3, 40) + b"x" * 12)], [], b"\0" * 4),
        "inside a string",
    ),
    "strings-utf8": (
        build([pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff")], []),
        "not UTF-8",
    ),
    "nested": (
        build([pair("a", ARRAY, struct.pack("<IQIQIQ", ARRAY, 1, ARRAY, 1, ARRAY, 1))], [], b"\0" * 64),
        "nested too deeply",
    ),
    "type": (build([pair("a", 99, b"\0" * 8)], []), "unknown type 99"),
    "twice": (build([ONE, ONE], []), "key 'a' twice"),
    "alignment": (build([pair("general.alignment", UINT32, struct.pack("<I", 3))], []), "power of two"),
    "dimensions": (build([], [info("t", (1,) * 9, 0, 0)], b"\0" * 64), "9 dimensions"),
    "overflow": (build([], [info("t", (1 << 62, 1 << 62), 0, 0)], b"\0" * 64), "outside the file"),
    "zero": (build([], [info("t", (0,), 0, 0)], b"\0" * 64), "cannot hold"),
    "ragged": (build([], [info("t", (33,), 8, 0)], b"\0" * 64), "Q8_0 cannot hold"),
    "kind": (build([], [info("t", (32,), 77, 0)], b"\0" * 64), "type 77; supported are F32"),
    "offset": (build([], [info("t", (32,), 0, 1 << 63)], b"\0" * 128), "outside the file"),
    "misaligned": (build([], [info("t", (1,), 0, 1)], b"\0" * 64), "misaligned"),
    "past-end": (build([], [info("t", (32,), 0, 32)], b"\0" * 128), "outside the file"),
    "overlap": (build([], [info("t", (32,), 0, 0), info("u", (8,), 0, 64)], b"\0" * 128), "over another one"),
    "tensor-twice": (build([], [info("t", (8,), 0, 0), info("t", (8,), 0, 32)], b"\0" * 128), "tensor 't' twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_naming_the_file(tmp_path: Path, case: str) -> None:
    content, problem = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=problem) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_hand_built_file_is_read_when_it_does_not_lie(tmp_path: Path) -> None:
    nested = pair("n", ARRAY, struct.pack("<IQIQB", ARRAY, 1, 7, 1, 1))
    content = build(
        [ONE, nested, pair("f", 12, struct.pack("<d", 0.5))], [info("t", (4, 2), 0, 0)], struct.pack("<8f", *range(8))
    )
    (tmp_path / "ok.gguf").write_bytes(content)
    file = GGUFFile(tmp_path / "ok.gguf")
    assert file.header.metadata == {"a": 7, "n": [[True]], "f": 0.5}
    assert file.read("t").tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "whole.gguf", random_model("LlamaForCausalLM", layers=1))
    content = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (*range(0, 3000, 7), len(content) // 2, len(content) - 32):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFormatError, match=r"cut\.gguf"):
            read_header(path)


def test_flipped_bytes_in_the_header_never_escape_as_another_error(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "whole.gguf", random_model("LlamaForCausalLM", layers=1))
    content = (tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    problems = []
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.integers(0, read_header(tmp_path / "whole.gguf").num_bytes)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            resolve(str(path))
        except ModelFormatError as error:
            problems.append(str(error))
    assert len(problems) > 50
    assert all(str(path) in problem for problem in problems)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    model = random_model("LlamaForCausalLM")
    write_llama_gguf(tmp_path / "missing.gguf", model, without=("blk.1.attn_v.weight",))
    with pytest.raises(ModelFormatError, match=r"missing\.gguf: the tensor 'blk\.1\.attn_v\.weight' is missing"):
        load(resolve(str(tmp_path / "missing.gguf")), "cpu", "float32")
    write_llama_gguf(tmp_path / "shape.gguf", model, extra={"output_norm.weight": np.ones(59, dtype=np.float32)})
    with pytest.raises(ModelFormatError, match=r"'output_norm\.weight' has shape \(59,\), but .* \(60,\)"):
        load(resolve(str(tmp_path / "shape.gguf")), "cpu", "float32")
