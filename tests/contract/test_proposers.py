"""What every proposer promises, over the registry: right guesses or wrong ones, the engine's tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.engine.proposer import Ask, Proposer
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.errors import ConfigurationError
from shared.protocol.sampling import PROPOSER_NAMES
from shared.speculative.registry import PROPOSERS, load_proposer
from tests.drafts import best, context_of, target_of, write_draft, write_heads
from tests.engine_fakes import VOCAB, expected_tokens, logits_for, make_engine, make_sequence, output_of, run_to_end
from tests.speculation_fakes import Confident, always

pytestmark = pytest.mark.parametrize("name", sorted(PROPOSERS))
Make = Callable[[str], Proposer]

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "minimum": {"temperature": 0.7, "stop_ids": (1, 2, 3, 4, 5), "min_tokens": 7},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A new proposer by name, with a small draft for those that want one."""
    target = target_of(tmp_path_factory.mktemp("target"))
    layers = write_draft(tmp_path_factory.mktemp("draft"), target, 1)
    heads = tmp_path_factory.mktemp("heads")
    write_heads(heads, target)

    def made(name: str) -> Proposer:
        proposer = load_proposer(name, context_of(target, heads if name == "heads" else layers, best()))
        assert proposer is not None
        return proposer

    return made


def repetitive(count: int) -> list[Sequence]:
    return [make_sequence([5, 6, 7, 8] * (2 + index), name=str(index), max_tokens=24) for index in range(count)]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tokens_are_those_without_it(name: str, make: Make, params: dict[str, Any], batch: int) -> None:
    speculation = always(Confident(make(name)))
    engine, _ = make_engine(num_blocks=600, max_num_seqs=32, speculation=speculation)
    sequences = [
        make_sequence([5, 6, 7, 8] * (2 + index % 5), name=str(index), **({"max_tokens": 24, "seed": index} | params))
        for index in range(batch)
    ]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    for sequence in sequences:
        assert output_of(sequence) == expected_tokens(sequence.tokens[: sequence.prompt_len], sequence.params)


def test_names_on_the_bus_are_those_of_the_registry(name: str) -> None:
    assert name in PROPOSER_NAMES
    assert len(PROPOSER_NAMES) == len(PROPOSERS)


# --- the distribution -------------------------------------------------------------------------------------------------

DRAWS = 3000
PLACE = 2


def distribution(prompt: list[int], place: int, temperature: float) -> np.ndarray:
    """Of the token `place` tokens behind the prompt: the fake model's softmax, summed over all that may come before."""
    reached: dict[tuple[int, ...], float] = {tuple(prompt): 1.0}
    for _ in range(place):
        reached = {
            (*context, token): weight * chance
            for context, weight in reached.items()
            for token, chance in enumerate(softmax(logits_for(context) / temperature))
        }
    parts = [weight * softmax(logits_for(context) / temperature) for context, weight in reached.items()]
    return np.asarray(np.sum(parts, axis=0))


def softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(values / values.sum())


def is_drawn_from(counts: np.ndarray, chances: np.ndarray) -> bool:
    """Pearson's chi-square test at a level of 1e-4; tokens expected less than five times are one outcome together."""
    expected = counts.sum() * chances
    rare = expected < 5
    found, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    statistic = ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    freedom = len(found) - 1
    return bool(statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3)


def drawn_with(speculation: Speculation, prompt: list[int], temperature: float) -> np.ndarray:
    """How often each token came `PLACE` tokens behind the prompt, for as many seeds as `DRAWS`."""
    engine, _ = make_engine(num_blocks=600, max_num_seqs=64, speculation=speculation)
    counts = np.zeros(VOCAB)
    for first in range(0, DRAWS, 100):
        sequences = [
            make_sequence(prompt, name=str(seed), seed=seed, max_tokens=PLACE + 3, temperature=temperature)
            for seed in range(first, first + 100)
        ]
        for sequence in sequences:
            engine.add(sequence)
        run_to_end(engine)
        for sequence in sequences:
            counts[output_of(sequence)[PLACE]] += 1
    return counts


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_sampled_has_the_targets_distribution(name: str, make: Make, temperature: float) -> None:
    speculation = always(Confident(make(name)))
    counts = drawn_with(speculation, prompt := [5, 6, 7, 8, 5, 6, 7], temperature)
    assert speculation.totals()[0][0] > 0, "nothing was guessed"
    assert is_drawn_from(counts, distribution(prompt, PLACE, temperature))
    assert not is_drawn_from(counts, distribution(prompt, PLACE, temperature + 0.3)), "the test would see nothing"


def test_drafts_keep_to_what_was_asked(name: str, make: Make) -> None:
    proposer = make(name)
    sequences = repetitive(4)
    for most in (1, 3, 8):
        drafts = proposer.propose([Ask(sequence, most) for sequence in sequences])
        assert len(drafts) == len(sequences)
        for draft in drafts:
            assert len(draft.tokens) == len(draft.confidences) <= most
            assert all(0.0 <= confidence <= 1.0 for confidence in draft.confidences)


def test_sequences_may_come_and_go_in_any_order(name: str, make: Make) -> None:
    proposer = make(name)
    first, second = repetitive(2)
    proposer.forget(first)
    proposer.propose([Ask(first, 2), Ask(second, 2)])
    proposer.forget(first)
    proposer.forget(first)
    assert len(proposer.propose([Ask(second, 2)])) == 1


def test_guessing_is_free_or_says_what_it_costs(name: str, make: Make) -> None:
    costs = [make(name).seconds(count) for count in (1, 8, 32)]
    assert costs == sorted(costs)
    assert costs[0] >= 0.0


def test_nothing_is_left_to_read_where_it_has_just_guessed(name: str, make: Make) -> None:
    proposer = make(name)
    [sequence] = repetitive(1)
    assert proposer.reading_seconds(sequence) >= 0.0
    proposer.propose([Ask(sequence, 2)])
    assert proposer.reading_seconds(sequence) == 0.0


def test_an_unknown_name_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load_proposer("oracle", context_of(target_of(tmp_path), None))
