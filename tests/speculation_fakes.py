"""Proposers whose guesses are right as often as a test wants, and costs that make every guess worth its row."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequence_

from shared.engine.account import Account
from shared.engine.engine import Engine
from shared.engine.patience import Patience
from shared.engine.proposer import Ask, Draft, Proposer
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.engine.step_costs import StepCosts
from tests.engine_fakes import VOCAB, expected_tokens


class FixedCosts(StepCosts):
    """What a test says steps cost, whatever they take."""

    def observe_step(self, num_rows: int, seconds: float) -> None:
        pass

    def observe_beside(self, seconds: float) -> None:
        pass


FREE_ROWS = FixedCosts([1, 1000], [1.0, 1.0 + 1e-9])
"""Rows cost nothing beside the step, so that all guesses are computed."""


class Oracle:
    """Knows what will be sampled by the fake model, and says something else with probability `wrong`."""

    name = "oracle"

    def __init__(self, wrong: float, seed: int = 0) -> None:
        self.wrong = wrong
        self._random = random.Random(seed)
        self._answers: dict[Sequence, list[int]] = {}
        self.forgotten: list[Sequence] = []

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        return [self._propose_one(ask) for ask in asks]

    def forget(self, sequence: Sequence) -> None:
        self._answers.pop(sequence, None)
        self.forgotten.append(sequence)

    def _propose_one(self, ask: Ask) -> Draft:
        sequence = ask.sequence
        if sequence not in self._answers:
            prompt = sequence.tokens[: sequence.prompt_len]
            self._answers[sequence] = expected_tokens(prompt, sequence.params, sequence.choices[0])
        right = self._answers[sequence][sequence.num_output :][: ask.max_tokens]
        said = [self._mistaken(token) if self._random.random() < self.wrong else token for token in right]
        return Draft(tuple(said), tuple([0.9] * len(said)))

    def _mistaken(self, token: int) -> int:
        return (token + self._random.randrange(1, VOCAB)) % VOCAB


class Unlimited(Account):
    """Guessing may take what it likes; steps of the fakes take no longer than a look."""

    def is_overdrawn(self) -> bool:
        return False


class NeverResting(Patience):
    """Guesses are looked for in every step."""

    def rests(self) -> bool:
        return False


class Confident:
    """Another proposer's guesses, said to be sure and free, so that they are computed however seldom they are right."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.name = proposer.name

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        drafts = self._proposer.propose(asks)
        return [Draft(draft.tokens, (0.95,) * len(draft.tokens)) for draft in drafts]

    def forget(self, sequence: Sequence) -> None:
        self._proposer.forget(sequence)


def always(*proposers: Proposer, max_draft_tokens: int = 4) -> Speculation:
    """All are asked in every step, and every guess goes into it."""
    return Speculation(
        proposers, {1: FREE_ROWS}, max_rows=512, max_draft_tokens=max_draft_tokens, new_account=Unlimited
    )


def let_guess_freely(engine: Engine) -> None:
    """As if rows cost nothing, whatever is measured: a tiny model's steps are as quick as a look for guesses."""
    assert engine.speculation is not None
    engine.speculation.tables = {1: FREE_ROWS}
    for member in engine.speculation._stack._members:
        member.account = Unlimited()
