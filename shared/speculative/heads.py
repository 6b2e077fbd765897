"""Guesses by heads on the target's own hidden rows (Medusa, arXiv 2401.10774), each knowing the guess before it.

A guess is made of the hidden row that the last token was drawn from and of that token; the next one of the heads' own
row and of the guess (as in Hydra, arXiv 2402.05109, with one set of weights for all places, as in arXiv 2403.09919).
There is no cache: nothing has to be computed for a prompt, sent with a hand-off or kept for a sequence. Draws have the
target's noise and the request's filters, penalties and bias.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_

import numpy as np

from shared.engine.draws import plan_guesses
from shared.engine.noise import F32
from shared.engine.proposer import Ask, Draft
from shared.engine.sequence import Sequence
from shared.speculative.context import ProposerContext
from shared.speculative.draft_vocabulary import DraftVocabulary
from shared.speculative.drafts import open_heads
from shared.speculative.heads_models import HeadsModel
from shared.speculative.pace import Pace

_LEAST_REACH = 0.35
"""A chain that is less likely right so far is not guessed on: a guess and its row cost a tenth of a step and more."""


class _Chain:
    """The guesses after one sequence, while they are made."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.tokens: tuple[int, ...] = ()
        self.confidences: tuple[float, ...] = ()
        self.reach = 1.0

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.ask.sequence.tokens[-1]

    @property
    def goes_on(self) -> bool:
        return len(self.tokens) < self.ask.max_tokens and self.reach > _LEAST_REACH

    def add(self, token: int, sureness: float) -> None:
        self.tokens += (token,)
        self.confidences += (sureness,)
        self.reach *= sureness


class HeadsProposer:
    """Implements `shared.engine.proposer.Proposer`. One call of the heads for each place of the drafts."""

    name = "heads"

    def __init__(self, model: HeadsModel, vocabulary: DraftVocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._pace = Pace()

    def seconds(self, num_sequences: int) -> float:
        """As observed for the nearest number of sequences."""
        return self._pace.seconds(num_sequences)

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        chains = [_Chain(ask) for ask in asks]
        known = [(chain, chain.ask.hidden) for chain in chains if chain.ask.hidden is not None]
        active, states = [chain for chain, _ in known], [hidden for _, hidden in known]
        while active:
            began = time.perf_counter()
            states = self._guess(active, np.stack(states))
            self._pace.observe(len(active), time.perf_counter() - began)
            states = [state for chain, state in zip(active, states, strict=True) if chain.goes_on]
            active = [chain for chain in active if chain.goes_on]
        return [Draft(chain.tokens, chain.confidences) for chain in chains]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def _guess(self, chains: list[_Chain], states: F32) -> list[F32]:
        """One more token for each chain; the rows to go on from."""
        draws = plan_guesses([(chain.ask.sequence, chain.tokens) for chain in chains])
        logits, drawn, hidden = self._model.run([chain.last for chain in chains], states, draws)
        for chain, row, token in zip(chains, logits, drawn.tolist(), strict=True):
            if token < 0:
                sequence = chain.ask.sequence
                token = self._vocabulary.sample(row, sequence.sample_input(sequence.choices[0], chain.tokens))
            chain.add(token, self._vocabulary.confidence(row, token))
        return list(hidden)


def make(context: ProposerContext) -> HeadsProposer | None:
    """On the draft that the worker has; None where that is of another kind."""
    opened = open_heads(context)
    return None if opened is None else HeadsProposer(*opened)
