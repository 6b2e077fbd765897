"""Safetensors folders: sharded and single, and nothing damaged or hostile gets past the header."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from shared.errors import ModelFormatError
from shared.model.registry import load
from shared.model.safetensors import SafetensorsFolder, read_tensor_index
from shared.model.source import resolve, weight_files
from tests.model_checkpoints import random_model, reference_logits, tokens
from tests.model_driver import ModelDriver

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file by hand, with any lie in it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_sharded_folder_loads_like_a_single_file(tmp_path: Path) -> None:
    model = random_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    decoder = load(resolve(str(tmp_path)), "cpu", "float32")
    prompt = tokens(30)
    assert (ModelDriver(decoder).chunked(prompt, 30) - reference_logits(model, prompt)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    halved = random_model("LlamaForCausalLM")
    for parameter in halved.parameters():
        parameter.data = parameter.data.to(dtype)
    halved.save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    decoder = load(resolve(str(tmp_path)), "cpu", "float32")
    prompt = tokens(30)
    expected = reference_logits(model, prompt)
    assert (ModelDriver(decoder).chunked(prompt, 30) - expected).abs().max() <= 1e-4


def test_progress_rises_to_one(tmp_path: Path) -> None:
    random_model("GPT2LMHeadModel", layers=3).save_pretrained(tmp_path)
    seen: list[float] = []
    load(resolve(str(tmp_path)), "cpu", "float32", seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) == 4


def test_names_without_the_optional_prefix(tmp_path: Path) -> None:
    model = random_model("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    bare = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in model.state_dict().items()}
    del bare["lm_head.weight"]
    save_file(bare, tmp_path / "model.safetensors")
    decoder = load(resolve(str(tmp_path)), "cpu", "float32")
    prompt = tokens(30)
    assert (ModelDriver(decoder).chunked(prompt, 30) - reference_logits(model, prompt)).abs().max() <= 1e-4


DAMAGED: dict[str, tuple[tuple[Any, ...], str]] = {
    "huge-header": (({"a": F32}, b"\0" * 8, 1 << 62), "claims a header of"),
    "header-past-end": (({"a": F32}, b"\0" * 8, 4000), "claims a header of"),
    "not-json": ((b"{oops", b""), "not JSON"),
    "not-utf8": ((b'{"\xff": 1}', b""), "not JSON"),
    "deep": ((b"[" * 100_000, b""), "not JSON"),
    "list": (([1, 2], b""), "not a JSON object"),
    "twice": ((b'{"a": {}, "a": {}}', b""), "twice"),
    "no-entry": (({"a": 3}, b""), "as None"),
    "dtype": (({"a": F32 | {"dtype": "F9"}}, b"\0" * 8), "'F9'"),
    "negative": (({"a": F32 | {"shape": [-2]}}, b"\0" * 8), "shape"),
    "fraction": (({"a": F32 | {"shape": [2.0]}}, b"\0" * 8), "shape"),
    "bool": (({"a": F32 | {"shape": [True, 2]}}, b"\0" * 8), "shape"),
    "dimensions": (({"a": F32 | {"shape": [1] * 9 + [2]}}, b"\0" * 8), "shape"),
    "overflow": (({"a": F32 | {"shape": [1 << 40, 1 << 40]}}, b"\0" * 8), "do not fit its shape"),
    "offsets": (({"a": F32 | {"data_offsets": [0]}}, b"\0" * 8), "offsets"),
    "backwards": (({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8), "do not fit its shape"),
    "past-end": (({"a": F32}, b"\0" * 4), "outside the data"),
    "overlap": (({"a": F32, "b": F32}, b"\0" * 16), "overlapping"),
    "hole": (({"a": F32 | {"data_offsets": [8, 16]}}, b"\0" * 16), "apart"),
    "rest": (({"a": F32}, b"\0" * 12), "of which its tensors take 8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_naming_the_file(tmp_path: Path, case: str) -> None:
    content, problem = DAMAGED[case]
    path = write(tmp_path / "model.safetensors", *content)
    with pytest.raises(ModelFormatError, match=problem) as caught:
        read_tensor_index(path)
    assert str(path) in str(caught.value)


def test_an_honest_header_is_read(tmp_path: Path) -> None:
    second = {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}
    path = write(tmp_path / "model.safetensors", {"__metadata__": {"a": "b"}, "b": second, "a": F32}, b"\0" * 10)
    assert read_tensor_index(path) == {"a": ("F32", (2,)), "b": ("BF16", ())}


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    random_model("GPT2LMHeadModel", layers=1).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (*range(0, 2500, 7), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFormatError, match=r"cut\.safetensors"):
            read_tensor_index(path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(ModelFormatError, match="tensor 'a' is I8; weights must be one of F32"):
        folder.read("a")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors"])
def test_shard_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(ModelFormatError, match="not a plain file name"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (folder / name).symlink_to(tmp_path / "secret.safetensors")
    if name != "model.safetensors":
        write_index(folder, {"a": name})
    with pytest.raises(ModelFormatError, match="outside the model folder"):
        weight_files(folder)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/123"))
    assert SafetensorsFolder(snapshot).read("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelFormatError, match=r"index\.json.*weight_map"):
        weight_files(tmp_path)


def test_missing_shard_and_missing_tensor_are_named(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(ModelFormatError, match=r"gone\.safetensors: the file is missing"):
        weight_files(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "gone.safetensors")
    with pytest.raises(ModelFormatError, match="tensor 'a' that the index promises is missing"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    random_model("GPT2LMHeadModel", layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ModelFormatError, match=r"pickled weights .* save_pretrained"):
        resolve(str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"holds neither model\.safetensors nor"):
        weight_files(tmp_path)


def test_shape_contradicting_the_config_is_named(tmp_path: Path) -> None:
    random_model("LlamaForCausalLM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 1000}))
    with pytest.raises(ModelFormatError, match=r"mlp\.gate_proj\.weight' has shape \(84, 60\).*\(1000, 60\)"):
        load(resolve(str(tmp_path)), "cpu", "float32")
