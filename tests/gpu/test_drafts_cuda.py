"""Drafts beside a target on a CUDA device: guesses are made there too, and change no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.speculative.registry import load_proposer
from tests.drafts import context_of, engine_of, generate, target_of, write_draft, write_heads
from tests.speculation_fakes import Confident, always

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("name", ["draft", "heads"])
def test_tokens_are_those_without_a_draft(name: str, batch: int, temperature: float, tmp_path: Path) -> None:
    target, folder = target_of(tmp_path / "target"), tmp_path / name
    if name == "heads":
        write_heads(folder, target)
    else:
        write_draft(folder, target, target.config.num_layers)
    proposer = load_proposer(name, context_of(target, folder, "cuda"))
    assert proposer is not None
    speculation = always(Confident(proposer), max_draft_tokens=4)
    guessed = generate(engine_of(target, speculation, on="cuda"), batch, temperature=temperature)
    assert guessed == generate(engine_of(target, None, on="cuda"), batch, temperature=temperature)
    drafted, accepted = speculation.totals()
    assert sum(drafted) > 0
    assert name == "heads" or sum(accepted) > 0
