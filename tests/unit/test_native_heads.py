"""Chains of guesses in one native call are those of one call for each guess."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.engine.draws import Draws, plan_guesses
from shared.kernels.library import Isa
from shared.kv.layout import KVLayout
from shared.model.draft import resolve_draft
from shared.model.native_draft import load_native_heads
from shared.model.native_heads import NativeHeads
from shared.model.source import ModelSource
from tests.drafts import HEAD_SIZE, target_of, write_heads
from tests.engine_fakes import make_sequence
from tests.model_checkpoints import VOCAB_SIZE, tokens
from tests.native_models import isas, library, native

SIZE = 64
PLACES = 5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return target_of(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def folder(target: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads")
    write_heads(path, target, num_layers=2)
    return path


def opened(target: ModelSource, folder: Path, isa: Isa, threads: int = 2) -> NativeHeads:
    config, draft = target.config, resolve_draft(folder, target)
    decoder = native(target, isa=isa, threads=threads)
    layout = KVLayout(draft.num_layers, config.num_kv_heads, config.head_dim, 16, k_transposed=True)
    return load_native_heads(draft, target, decoder, library(), layout, threads)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, SIZE)).astype(np.float32)


def draws(indices: Iterable[int], ahead: int = 0) -> Draws:
    """Greedy, sampled and filtered rows in turn, `ahead` places behind the first guess."""
    ways: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9})
    planned = []
    for index in indices:
        sequence = make_sequence(tokens(4, seed=index), seed=index, max_tokens=90, **ways[index % len(ways)])
        planned.append((sequence, tuple(tokens(ahead, seed=index))))
    return plan_guesses(planned)


def one_by_one(
    heads: NativeHeads, ids: list[int], states: np.ndarray, limits: list[int], least: float
) -> list[tuple[list[int], list[float], list[float]]]:
    """The slow version: a call for each guess of each chain."""
    found = []
    for index, (token, limit) in enumerate(zip(ids, limits, strict=True)):
        words, sureness, state, reach = list[int](), list[float](), states[index : index + 1], np.float32(1.0)
        while len(words) < limit and reach > least:
            guess = heads.guess([token], state, draws([index], len(words)), [1], [float(reach)], least_reach=least)
            token, state = int(guess.tokens[0, 0]), guess.states
            words.append(token)
            sureness.append(float(guess.sureness[0, 0]))
            reach *= guess.sureness[0, 0]
        found.append((words, sureness, state[0].tolist()))
    return found


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("least", [0.0, 1e-3])
@pytest.mark.parametrize("count", [1, 3, 9, 33])
def test_a_chain_is_what_single_guesses_are(
    count: int, least: float, isa: Isa, target: ModelSource, folder: Path
) -> None:
    heads, states, ids = opened(target, folder, isa), rows(count), tokens(count, seed=7)
    limits = [1 + index * 7 % PLACES for index in range(count)]
    guesses = heads.guess(ids, states, draws(range(count)), limits, [1.0] * count, least_reach=least)
    lengths = (guesses.tokens >= 0).sum(1).tolist()
    columns = zip(guesses.tokens.tolist(), guesses.sureness.tolist(), guesses.states.tolist(), lengths, strict=True)
    together = [(words[:length], sureness[:length], state) for words, sureness, state, length in columns]
    assert together == one_by_one(heads, ids, states, limits, least)


def test_guesses_are_the_same_on_every_instruction_set(target: ModelSource, folder: Path) -> None:
    results = [
        opened(target, folder, isa, threads).guess(
            tokens(9, seed=1), rows(9), draws(range(9)), [4] * 9, [1.0] * 9, least_reach=0.0
        )
        for isa in isas()
        for threads in (1, 3)
    ]
    assert all((result.tokens == results[0].tokens).all() for result in results)
    assert all((result.states == results[0].states).all() for result in results)


def test_a_chain_ends_where_it_is_unlikely(target: ModelSource, folder: Path) -> None:
    heads = opened(target, folder, isas()[-1])
    whole = heads.guess(tokens(8, seed=1), rows(8), draws(range(8)), [4] * 8, [1.0] * 8, least_reach=0.0)
    reach = np.cumprod(whole.sureness, axis=1)
    least = float(np.median(reach[:, 1]))
    cut = heads.guess(tokens(8, seed=1), rows(8), draws(range(8)), [4] * 8, [1.0] * 8, least_reach=least)
    goes_on = np.concatenate([np.ones((8, 1), bool), reach[:, :-1] > least], axis=1)
    assert (cut.tokens == np.where(goes_on, whole.tokens, -1)).all()
    assert 8 < goes_on.sum() < 32


def test_half_a_reach_is_half_gone(target: ModelSource, folder: Path) -> None:
    """A chain that was begun in another call ends where it would have in one."""
    heads, states = opened(target, folder, isas()[-1]), rows(1)
    sure = heads.guess([3], states, draws(range(1)), [1], [1.0], least_reach=0.0).sureness[0, 0]
    counts = [
        int((heads.guess([3], states, draws(range(1)), [2], [reach], least_reach=0.75 * sure).tokens >= 0).sum())
        for reach in (1.0, 0.5)
    ]
    assert counts == [2, 1]


def test_sureness_is_a_probability_of_the_ids_that_heads_know(target: ModelSource, folder: Path) -> None:
    heads = opened(target, folder, isas()[-1])
    guesses = heads.guess(tokens(30, seed=2), rows(30), draws(range(30)), [1] * 30, [1.0] * 30, least_reach=0.0)
    assert ((guesses.sureness > 0) & (guesses.sureness <= 1)).all()
    greedy = guesses.sureness[::3, 0]
    assert (greedy >= 1 / HEAD_SIZE).all()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_tokens_that_there_are_not_are_refused(token: int, target: ModelSource, folder: Path) -> None:
    with pytest.raises(IndexError, match="token id"):
        opened(target, folder, isas()[-1]).guess([token], rows(1), draws(range(1)), [1], [1.0], least_reach=0.0)
