"""Tokenizers built from GGUF metadata, against independent builders of the same vocabulary."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from shared.errors import ModelFormatError
from shared.model.source import resolve
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.gguf_vocab import PRE_TOKENIZATIONS, build_tokenizer, read_vocab
from shared.tokenizer.loader import load_tokenizer
from tests.text_models import (
    CHATML,
    CONTROL,
    PLAIN_ADDED,
    byte_level_entries,
    byte_level_tokenizer,
    model_source,
    write_gguf,
)

_SAMPLES = [
    "Hello world, it's 12345 degrees!",
    "  leading and trailing  \n\n\n tabs\t\there\r\nrows",
    "naïve café Ǆ e\u0301 你好 🧪👩‍👩‍👧",
    "I'LL we'll 3.14 ½ ² x²+y²=z² a<b>c~d|e^f",
    "<think>reason</think> <|not special|> [INST]",
]


def metadata(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


@lru_cache
def entries(pre: str) -> dict[str, Any]:
    return byte_level_entries(byte_level_tokenizer(), pre)


def codec(pre: str, **changes: Any) -> TextCodec:
    return TextCodec(build_tokenizer(read_vocab(metadata({**entries(pre), **changes}))))


def words(pre: str, text: str) -> list[str]:
    """How a pre-tokenization cuts a text."""
    return [text[start:end] for _, (start, end) in PRE_TOKENIZATIONS[pre].split().pre_tokenize_str(text)]


@lru_cache
def references() -> dict[str, Any]:
    """transformers' own tokenizers over the same vocabulary and merges."""
    given = entries("gpt-2")
    vocab = {token: index for index, token in enumerate(given["tokens"])}
    merges: Any = [tuple(merge.split(" ")) for merge in given["merges"]]
    return {
        "gpt-2": GPT2Tokenizer(vocab=vocab, merges=merges),
        "qwen2": Qwen2Tokenizer(vocab=vocab, merges=merges),
    }


def encode_by_reference(reference: Any, text: str) -> list[int]:
    ids: list[int] = reference(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
@settings(deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "<" not in text))
def test_ids_equal_transformers_own_tokenizer(pre: str, text: str) -> None:
    assert _cached(pre).encode(text) == encode_by_reference(references()[pre], text)


@lru_cache
def _cached(pre: str) -> TextCodec:
    return codec(pre)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZATIONS))
@pytest.mark.parametrize("text", _SAMPLES)
def test_text_survives_encoding_and_decoding(pre: str, text: str) -> None:
    expected = text.replace("e\u0301", "é") if pre == "qwen2" else text
    assert _cached(pre).decode(_cached(pre).encode(text)) == expected


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's 12345", ["it", "'s", " 12345"]),
        ("smollm", "it's 12345", ["it", "'s", " ", "1", "2", "3", "4", "5"]),
        ("starcoder", "a 90", ["a", " ", "9", "0"]),
        ("llama-bpe", "I'LL pay 12345\n\n now", ["I", "'LL", " pay", " ", "123", "45", "\n\n", " now"]),
        ("qwen2", "I'LL pay 12345", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", "(yes)", ["(yes", ")"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    ],
)
def test_known_cuts(pre: str, text: str, expected: list[str]) -> None:
    assert words(pre, text) == expected


def test_a_whole_word_token_needs_no_merges_with_llama_bpe() -> None:
    changes = {"tokens": ["z", "q", "zq"], "token_type": [1, 1, 1], "merges": [], "bos_token_id": 0, "eos_token_id": 1}
    assert codec("llama-bpe", **changes).encode("zq") == [2]
    assert codec("gpt-2", **changes).encode("zq") == [0, 1]


def test_unknown_names_are_refused_and_the_known_ones_listed() -> None:
    with pytest.raises(ModelFormatError, match=r"pre 'tekken'.*gpt-2.*llama-bpe.*qwen2.*smollm"):
        codec("tekken")
    with pytest.raises(ModelFormatError, match=r"model 'bert'.*gpt2, llama"):
        codec("gpt-2", model="bert")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"tokens": "abc"}, "array of strings"),
        ({"token_type": [1, 2]}, "array of"),
        ({"tokens": ["a", "b"], "token_type": ["", ""]}, "array of 2 numbers"),
        ({"tokens": ["a", "b"], "token_type": [1.0, float("inf")]}, "array of 2 numbers"),
        ({"tokens": ["a", "b"], "scores": [0.5, None]}, "array of 2 numbers"),
        ({"merges": ["ab"]}, "blank between"),
        ({"merges": ["no_such nope_"]}, "does not make a tokenizer"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_damaged_vocabularies_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFormatError, match=said):
        codec("gpt-2", **changes)


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    text = _cached("smollm")
    ids = entries("smollm")["tokens"]
    assert set(text.control_tokens) == set(CONTROL)
    assert not text.is_special(ids.index(PLAIN_ADDED[0]))
    assert text.encode(PLAIN_ADDED[0]) == [ids.index(PLAIN_ADDED[0])]
    assert ids.index(CONTROL[1]) not in text.encode(f"a{CONTROL[1]}b")
    assert text.encode(CONTROL[1], allow_special=True) == [ids.index(CONTROL[1])]


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_as_the_file_or_the_pre_tokenizer_says(pre: str, add_bos: bool | None, expected: bool) -> None:
    changes = {} if add_bos is None else {"add_bos_token": add_bos}
    text = codec(pre, **changes)
    bos = entries(pre)["bos_token_id"]
    assert (text.encode("hi", add_special_tokens=True)[0] == bos) is expected
    assert text.encode("hi")[0] != bos


def test_bos_and_eos_wrap_a_text_that_spells_them() -> None:
    text = codec("gpt-2", add_bos_token=True, add_eos_token=True)
    bos, eos = (entries("gpt-2")[name] for name in ("bos_token_id", "eos_token_id"))
    ids = text.encode(CONTROL[2], add_special_tokens=True)
    assert ids == [bos, *text.encode(CONTROL[2]), eos]
    assert eos not in text.encode(CONTROL[2])


def test_a_gguf_file_is_loaded_with_its_template(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**entries("smollm"), "tokenizer.chat_template": CHATML})
    text = load_tokenizer(model_source("gguf", path, eos_ids=(7,)))
    eos = entries("smollm")["eos_token_id"]
    assert text.eos_ids == (7, eos)
    assert text.bos_id == entries("smollm")["bos_token_id"]
    assert text.vocab_size == len(entries("smollm")["tokens"])
    assert text.template.render([{"role": "user", "content": "hi"}]).text.startswith("<|im_start|>user\nhi")


# -- SentencePiece --------------------------------------------------------------------------------


_PIECES = ["▁", "t", "h", "e", "n", "a", "c", "▁t", "he", "▁the", "th", "▁th", "en", "▁then", "an", "▁a", "ca", "can"]


@lru_cache
def sentencepiece_entries() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES, "<", "s>", "<keep>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(_PIECES) + 2), 4]
    scores = [0.0] * 259 + [-float(7 * index % 11) - index / 100 for index in range(len(_PIECES) + 3)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, **ids}


@lru_cache
def sentencepiece_codec() -> TextCodec:
    return TextCodec(build_tokenizer(read_vocab(metadata(sentencepiece_entries()))))


def merge_by_hand(text: str) -> list[int]:
    """SentencePiece's rule: while neighbours join to a piece, join those of the best score, leftmost first."""
    tokens, scores = sentencepiece_entries()["tokens"], sentencepiece_entries()["scores"]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[tokens.index(a + b)], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in _PIECES]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [tokens.index(part)] if part in tokens else [tokens.index(f"<0x{b:02X}>") for b in part.encode()]
    return ids


@settings(deadline=None)
@given(st.text(alphabet="thenac <>é🧪", min_size=1, max_size=25))
def test_sentencepiece_ids_equal_score_merging_by_hand(text: str) -> None:
    assert sentencepiece_codec().encode(text) == merge_by_hand(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_sentencepiece_text_survives_through_bytes(text: str) -> None:
    plain = text.replace("▁", "_")
    assert sentencepiece_codec().decode(sentencepiece_codec().encode(plain)) == plain


def test_sentencepiece_adds_bos_and_never_forms_control_tokens_from_text() -> None:
    text = sentencepiece_codec()
    assert text.encode("then", add_special_tokens=True)[0] == 1
    assert not {1, 2} & set(text.encode("<s></s>"))
    assert text.encode("<s>", allow_special=True) == [1]


# -- SmolLM2 from its package ---------------------------------------------------------------------


@lru_cache
def smollm2() -> TextCodec:
    return load_tokenizer(resolve("smollm2"))


@lru_cache
def smollm2_by_transformers() -> Any:
    """transformers reads the same file, but loses the split of digits, which the original tokenizer.json has."""
    path = resolve("smollm2").path
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    reference.backend_tokenizer.pre_tokenizer = cut
    return reference


def test_smollm2_loads_fast_and_as_described() -> None:
    start = time.perf_counter()
    text = load_tokenizer(resolve("smollm2"))
    assert time.perf_counter() - start < 2.0
    assert (text.vocab_size, text.eos_ids, text.bos_id) == (49152, (2,), 1)
    assert len(text.control_tokens) == 17
    assert text.encode("hi", add_special_tokens=True) == text.encode("hi")


@pytest.mark.parametrize("text", _SAMPLES)
def test_smollm2_ids_equal_transformers(text: str) -> None:
    assert smollm2().encode(text) == encode_by_reference(smollm2_by_transformers(), text)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_smollm2_ids_equal_transformers_for_any_text(text: str) -> None:
    ids = smollm2().encode(text, allow_special=True)
    assert ids == encode_by_reference(smollm2_by_transformers(), text)
    assert smollm2().decode(ids) == smollm2_by_transformers().decode(ids, skip_special_tokens=True)


def test_smollm2_control_tokens_in_text_are_encoded_as_if_they_did_not_exist() -> None:
    state = json.loads(smollm2_by_transformers().backend_tokenizer.to_str())
    without = Tokenizer.from_str(json.dumps({**state, "added_tokens": []}))
    for token in smollm2().control_tokens:
        text = f"say {token} twice {token}"
        assert smollm2().encode(text) == without.encode(text).ids
