"""Any bytes as a model file: read, or refused in one sentence that names it, without allocating what it claims."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigurationError, ModelFormatError
from shared.model.gguf import GGUFFile, read_header
from shared.model.gguf_config import from_gguf
from shared.model.hf_config import from_hf
from shared.model.safetensors import SafetensorsFolder, read_tensor_index
from shared.model.source import resolve
from shared.tokenizer.gguf_vocab import build_tokenizer, read_vocab
from tests.fuzz.damage import EXTREMES, allocates_at_most, damaged, refusal_of
from tests.text_models import byte_level_entries, byte_level_tokenizer, write_gguf
from tests.tiny_model import write_tiny_model

MANY = settings(max_examples=150, deadline=None)
SOME = settings(max_examples=100, deadline=None)
ROOM = 2 << 20
"""Bytes a reader may take for the small files here, whatever they claim to hold."""

text = st.text(max_size=8).map(lambda value: struct.pack("<Q", len(value.encode())) + value.encode())
numbers = st.sampled_from(EXTREMES) | st.integers(0, 64)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & (2**64 - 1))


def u32(value: int) -> bytes:
    return struct.pack("<I", value & (2**32 - 1))


@st.composite
def gguf_values(draw: st.DrawFn, depth: int = 3) -> bytes:
    """A type number and a value that may or may not belong to it, arrays within arrays too."""
    kind = draw(st.integers(0, 13))
    if kind == 9 and depth:
        count = draw(numbers)
        inner = draw(gguf_values(depth - 1))
        return u32(kind) + inner[:4] + u64(count) + inner[4:] * min(count, 3)
    return u32(kind) + (draw(text) if kind == 8 else draw(st.binary(max_size=8)))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """A header in the right order, of right and wrong parts."""
    pairs = draw(st.lists(st.tuples(text, gguf_values()).map(b"".join), max_size=4))
    infos = [
        draw(text) + u32(num) + b"".join(u64(draw(numbers)) for _ in range(min(num, 5))) + u32(kind) + u64(offset)
        for num, kind, offset in draw(
            st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, 8, 12, 30, 77]), numbers), max_size=4)
        )
    ]
    counts = draw(st.sampled_from([(len(infos), len(pairs))]) | st.tuples(numbers, numbers))
    header = b"GGUF" + u32(draw(st.sampled_from([2, 3]) | numbers)) + u64(counts[0]) + u64(counts[1])
    return header + b"".join(pairs + infos) + draw(st.binary(max_size=256))


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "whole.gguf", {"general.architecture": "llama", "a.list": [1, 2, 3], "a.text": "text"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Not `tmp_path`: hypothesis runs many examples in one test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_or_refuse(path: Path, data: bytes, read: Callable[[Path], object]) -> None:
    path.write_bytes(data)
    with allocates_at_most(ROOM + 32 * len(data)):
        error = refusal_of(ModelFormatError, lambda: read(path))
    if error is not None:
        assert str(path) in str(error)
        assert len(str(error)) < 2000 + len(str(path))
        assert "\n" not in str(error)


def read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name, shape in file.shapes.items():
        assert file.read(name).shape == shape


@MANY
@given(data=st.data())
def test_a_damaged_gguf_file(whole_gguf: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        read_or_refuse(Path(name) / "m.gguf", data.draw(damaged(whole_gguf)), read_gguf)


@MANY
@given(gguf_files() | st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"GGUF\3\0\0\0" + rest))
def test_a_generated_gguf_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        read_or_refuse(Path(name) / "m.gguf", content, read_gguf)


def test_generated_gguf_files_are_not_all_refused() -> None:
    """A fuzzer whose files are all refused at once would prove nothing about what lies behind."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "m.gguf"
        pair = u64(1) + b"a" + u32(9) + u32(9) + u64(1) + u32(4) + u64(1) + u32(7)
        path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + pair)
        assert read_header(path).metadata == {"a": [[7]]}


def test_a_gguf_header_is_bounded_however_large_the_file(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with room for it may not make a list of a billion numbers either."""
    monkeypatch.setattr("shared.model.gguf._MAX_HEADER_BYTES", 4096)
    path = scratch / "m.gguf"
    array = u64(1) + b"a" + u32(9) + u32(0) + u64(60_000)
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + array + bytes(64_000))
    with pytest.raises(ModelFormatError, match="claims 60000 array items"):
        read_header(path)


# Safetensors

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(EXTREMES) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
sizes = st.lists(st.integers(0, 4) | st.sampled_from(EXTREMES), max_size=4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8"]) | json_values,
        "shape": sizes | json_values,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list) | sizes | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4)


@MANY
@given(headers | json_values, st.binary(max_size=64), st.none() | numbers)
def test_a_generated_safetensors_header(header: Any, rest: bytes, length: int | None) -> None:
    packed = json.dumps(header).encode()
    data = u64(len(packed) if length is None else length) + packed + rest
    with tempfile.TemporaryDirectory() as name:
        read_or_refuse(Path(name) / "m.safetensors", data, read_tensor_index)


@MANY
@given(data=st.data())
def test_a_damaged_safetensors_file(folder: Path, data: st.DataObject) -> None:
    """What passes our own check is also opened by the library, whose failure would not be one of ours."""
    whole = (folder / "model.safetensors").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        path.write_bytes(data.draw(damaged(whole, head=3000)))

        def read_all() -> None:
            tensors = SafetensorsFolder(path.parent)
            for tensor, shape in tensors.shapes.items():
                assert tuple(tensors.read(tensor).shape) == shape

        error = refusal_of(ModelFormatError, read_all)
        assert error is None or str(path) in str(error)


@SOME
@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_index_and_config(content: bytes) -> None:
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch)
            (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
            (path / name).write_bytes(content)
            with pytest.raises((ModelFormatError, ConfigurationError)) as caught:
                resolve(scratch)
            assert scratch in str(caught.value)


# What the metadata says

HF_KEYS = (
    *("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_hidden_layers", "intermediate_size", "max_position_embeddings", "rope_theta", "rope_scaling", "hidden_act"),
    *("rms_norm_eps", "eos_token_id", "bos_token_id", "sliding_window", "torch_dtype", "n_head", "n_embd", "n_layer"),
)


@MANY
@given(data=st.data())
def test_any_config_of_a_folder(folder: Path, data: st.DataObject) -> None:
    """One or more fields of an honest config replaced by anything that JSON can hold."""
    config = json.loads((folder / "config.json").read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(HF_KEYS), json_values | st.sampled_from(EXTREMES), min_size=1))
    kind = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_bigcode"]))
    error = refusal_of(ModelFormatError, lambda: from_hf({**config, "model_type": kind, **changes}))
    assert len(str(error)) < 2000


metadata_values = json_values | st.lists(st.integers(-2, 10), max_size=5) | st.lists(st.text(max_size=3), max_size=5)


@MANY
@given(data=st.data())
def test_any_metadata_of_a_gguf_file(data: st.DataObject) -> None:
    honest: dict[str, object] = {
        **{"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32},
        **{"llama.attention.head_count": 4, "llama.feed_forward_length": 64, "llama.context_length": 128},
        **{"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 300},
        **_vocabulary(),
    }
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(honest)), metadata_values, min_size=1, max_size=3))
    for read in (from_gguf, lambda metadata: build_tokenizer(read_vocab(metadata))):
        read(honest)
        error = refusal_of(ModelFormatError, lambda read=read: read({**honest, **changes}))  # type: ignore[misc]
        assert len(str(error)) < 2000


def _vocabulary() -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}" if "." not in key else key: value for key, value in _ENTRIES.items()}


_ENTRIES = byte_level_entries(byte_level_tokenizer(), "default")
