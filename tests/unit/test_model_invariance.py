"""A row has the same bits alone, in any batch, and however its sequence was cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.kv.layout import KVLayout
from shared.model.decoder import Decoder
from shared.model.invariance import numerics_fingerprint, probe
from shared.model.layers import PackedLinear
from shared.model.registry import load
from shared.model.source import ModelSource, resolve
from tests.invariance_checks import (
    ROW_COUNTS,
    check_chunks,
    check_every_row_of_every_row_count,
    check_mixed_steps,
    same_bits,
)
from tests.model_checkpoints import random_model, save_and_load, tokens
from tests.model_driver import DrivenSequence, ModelDriver

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa3": ("LlamaForCausalLM", {"heads": 6, "kv_heads": 2, "head_dim": 16, "hidden_size": 96}),
    "gqa3-odd": ("LlamaForCausalLM", {"heads": 9, "kv_heads": 3, "head_dim": 10, "intermediate_size": 77}),
    "qwen3-gqa3": ("Qwen3ForCausalLM", {"heads": 3, "kv_heads": 1, "head_dim": 64, "intermediate_size": 201}),
    "gpt2-odd": ("GPT2LMHeadModel", {"heads": 3, "head_dim": 25, "n_inner": 203}),
    "bigcode-mqa": ("GPTBigCodeForCausalLM", {"heads": 5, "head_dim": 12, "n_inner": 99}),
}


CASES = [(name, 1) for name in MODELS] + [(name, 2) for name in ("gqa3", "gqa3-odd")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-threads")
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Decoder]:
    """A tiny model, and the number of compute threads set for it."""
    name, threads = request.param
    architecture, settings = MODELS[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield save_and_load(random_model(architecture, **settings), tmp_path)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2() -> tuple[ModelSource, Decoder]:
    source = resolve("smollm2")
    return source, load(source, "cpu", "float32")


def test_every_row_of_every_row_count(decoder: Decoder) -> None:
    check_every_row_of_every_row_count(decoder, [tokens(1 + 5 * index % 167, seed=index) for index in ROW_COUNTS])


def test_chunks(decoder: Decoder) -> None:
    check_chunks(decoder, tokens(280))


def test_mixed_steps(decoder: Decoder) -> None:
    check_mixed_steps(decoder, [tokens(length, seed=length) for length in (1, 4, 63, 129, 130, 200)], seed=11)


def test_lossy_cache_is_read_back_rounded(decoder: Decoder) -> None:
    prompt = tokens(200)
    check_chunks(decoder, prompt, torch.bfloat16)
    exact = ModelDriver(decoder).chunked(prompt, len(prompt))
    rounded = ModelDriver(decoder, kv_dtype=torch.bfloat16).chunked(prompt, len(prompt))
    assert not same_bits(rounded, exact)  # else the cache was not lossy and nothing was shown


def test_wider_tables_and_other_blocks_change_no_bit(decoder: Decoder) -> None:
    prompt = tokens(90)
    driver = ModelDriver(decoder)
    plain = driver.logits([(DrivenSequence(), prompt)])[0]
    wide = driver.logits([(DrivenSequence(), prompt)], extra_blocks=40)[0]
    small = ModelDriver(decoder, block_size=4).logits([(DrivenSequence(), prompt)])[0]
    assert same_bits(wide, plain)
    assert same_bits(small, plain)


def test_a_broken_sequence_harms_no_other(decoder: Decoder) -> None:
    prompt, victim = tokens(50), tokens(21, seed=1)
    driver = ModelDriver(decoder)
    expected = ModelDriver(decoder).logits([(DrivenSequence(), prompt)])[0][-1]
    sequence, broken = DrivenSequence(), DrivenSequence()
    driver.step([(sequence, prompt[:-1]), (broken, victim)])
    driver.cache[:, broken.blocks] = torch.nan
    logits, harmed = driver.logits([(sequence, prompt[-1:]), (broken, victim[:1])])
    assert harmed.isnan().all()
    assert same_bits(logits[-1], expected)
    assert not driver.cache[:, 0].isnan().any()


def layout_of(decoder: Decoder, dtype: str = "float32") -> KVLayout:
    config = decoder.config
    return KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype)


def test_probe_passes_with_padding(decoder: Decoder) -> None:
    result = probe(decoder, layout_of(decoder))
    assert result.ok
    assert "bits equal" in result.detail


def test_probe_fires_without_padding(tmp_path: Path) -> None:
    architecture, settings = MODELS["gqa3"]
    decoder = save_and_load(random_model(architecture, **settings), tmp_path, row_pad=1)
    result = probe(decoder, layout_of(decoder))
    assert not result.ok
    assert "bits differ" in result.detail


@pytest.mark.parametrize("num_rows", [4, 8, 12, 20])
@pytest.mark.parametrize("row", [0, -2])
def test_probe_fires_when_one_bit_depends_on_the_row_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, row: int
) -> None:
    decoder = save_and_load(random_model("LlamaForCausalLM"), tmp_path)
    sound = PackedLinear.__call__

    def faulty(self: PackedLinear, rows: Tensor) -> Tensor:
        result = sound(self, rows)
        if len(rows) == num_rows:
            result[row] = torch.nextafter(result[row], torch.tensor(torch.inf))
        return result

    monkeypatch.setattr(PackedLinear, "__call__", faulty)
    assert not probe(decoder, layout_of(decoder)).ok


def test_probe_covers_a_lossy_cache(decoder: Decoder) -> None:
    assert probe(decoder, layout_of(decoder, "bfloat16")).ok


def test_fingerprint_tells_apart_what_computes_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("LlamaForCausalLM")
    decoder = save_and_load(model, tmp_path / "a")
    source = resolve(str(tmp_path / "a"))
    again = load(source, "cpu", "float32")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    other = save_and_load(model, tmp_path / "b")
    fingerprint = numerics_fingerprint(decoder, source, "float32")
    assert len(fingerprint) == 16
    assert numerics_fingerprint(again, source, "float32") == fingerprint
    different = {
        numerics_fingerprint(decoder, source, "bfloat16"),
        numerics_fingerprint(decoder.with_row_pad(1), source, "float32"),
        numerics_fingerprint(load(source, "cpu", "bfloat16"), source, "float32"),
        numerics_fingerprint(other, source, "float32"),
    }
    monkeypatch.setattr("shared.model.invariance.DRAWS_VERSION", 0)
    different.add(numerics_fingerprint(decoder, source, "float32"))
    assert len(different | {fingerprint}) == 6


def test_fingerprint_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    decoder = save_and_load(random_model("Qwen3ForCausalLM"), tmp_path)
    source = resolve(str(tmp_path))
    before, found = torch.get_num_threads(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.add(numerics_fingerprint(decoder, source, "float32"))
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestSmolLM2:
    """The same on real shapes."""

    def test_every_row_of_every_row_count(self, smollm2: tuple[ModelSource, Decoder]) -> None:
        prompts = [tokens(1 + 5 * index % 167, seed=index) for index in ROW_COUNTS]
        check_every_row_of_every_row_count(smollm2[1], prompts)

    def test_chunks(self, smollm2: tuple[ModelSource, Decoder]) -> None:
        check_chunks(smollm2[1], tokens(150))

    def test_chunks_through_a_lossy_cache(self, smollm2: tuple[ModelSource, Decoder]) -> None:
        check_chunks(smollm2[1], tokens(140), torch.bfloat16)

    def test_mixed_steps(self, smollm2: tuple[ModelSource, Decoder]) -> None:
        check_mixed_steps(smollm2[1], [tokens(length, seed=length) for length in (1, 4, 63, 130, 200)], seed=11)

    def test_probe_passes_with_padding_and_fires_without(self, smollm2: tuple[ModelSource, Decoder]) -> None:
        decoder = smollm2[1]
        assert probe(decoder, layout_of(decoder)).ok
        assert not probe(decoder.with_row_pad(1), layout_of(decoder)).ok
