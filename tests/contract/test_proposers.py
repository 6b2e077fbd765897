"""What every proposer promises, over the registry: right guesses or wrong ones, the engine's tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.engine.proposer import Ask, Proposer
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.errors import ConfigurationError
from shared.speculative.registry import PROPOSERS, load_proposer
from tests.drafts import context_of, target_of, write_draft
from tests.engine_fakes import expected_tokens, make_engine, make_sequence, output_of, run_to_end
from tests.speculation_fakes import FREE_ROWS

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
    context = context_of(target, write_draft(tmp_path_factory.mktemp("draft"), target, 1))

    def made(name: str) -> Proposer:
        proposer = load_proposer(name, context)
        assert proposer is not None
        return proposer

    return made


def repetitive(count: int) -> list[Sequence]:
    return [make_sequence([5, 6, 7, 8] * (2 + index), name=str(index), max_tokens=24) for index in range(count)]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tokens_are_those_without_it(name: str, make: Make, params: dict[str, Any], batch: int) -> None:
    speculation = Speculation((make(name),), {1: FREE_ROWS}, max_rows=512)
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


def test_an_unknown_name_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load_proposer("oracle", context_of(target_of(tmp_path), None))
