"""Small tokenizers and model folders that the text tests make for themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shared.model.config import ModelConfig
from shared.model.source import GenerationDefaults, ModelSource

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<think>", "</think>")
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and then it doesn't jump any more.",
    "In 2024 there were 12345 reasons to count to 678; we'll see 90 of them.",
    "Schöne Grüße aus Köln! Ça va très bien, où est la gare?",
    "你好,世界。今天天气很好。 😀😃 👩‍👩‍👧 naïve café",
    "def main():\n    return {'a': [1, 2, 3]}\n\n\n    # the end\t\n",
    "system user assistant You are a helpful assistant. Hello Hello the the the there here where",
) * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 420) -> Tokenizer:
    """A GPT-2-like tokenizer with three control tokens and two added tokens that are ordinary text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, vocab_size, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    return tokenizer


def sentencepiece_tokenizer(*, byte_fallback: bool = True, vocab_size: int = 420) -> Tokenizer:
    """A Llama-2-like tokenizer: a mark before every word, bytes for characters that have no token."""
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size + 256, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the byte tokens are ordinary vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace_tokenizer(prepend_scheme: str = "first") -> Tokenizer:
    """A tokenizer that marks word starts in its pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *CONTROL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _train(tokenizer: Tokenizer, vocab_size: int, alphabet: Sequence[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CONTROL), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that is there."""
    found = tokenizer.token_to_id(text)
    assert found is not None, text
    return found


def write_folder(folder: Path, tokenizer: Tokenizer, config: Mapping[str, object] | None = None) -> Path:
    """Save the tokenizer files of a model folder; `config` goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**defaults, **(config or {})}))
    return folder


def model_source(kind: str, path: Path, eos_ids: tuple[int, ...] = ()) -> ModelSource:
    """A source whose weights nobody will ask for."""
    config = ModelConfig("LlamaForCausalLM", 512, 8, 8, 1, 1, 1, 8, 128)
    return ModelSource(kind, path, path.stem, config, GenerationDefaults(eos_ids=eos_ids), "test")


def write_gguf(path: Path, entries: Mapping[str, Any]) -> Path:
    """A GGUF file without tensors; `entries` are tokenizer.ggml.* keys, or whole keys where they hold a dot."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        key = name if "." in name else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_entries(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The GGUF entries of a byte-level tokenizer: control tokens of type 3, added text tokens of type 4."""
    state = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = [3 if token in CONTROL else 4 if token in PLAIN_ADDED else 1 for token in tokens]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "bos_token_id": vocab["<|im_start|>"],
        "eos_token_id": vocab["<|im_end|>"],
    }
