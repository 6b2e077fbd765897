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

from shared.engine.proposer import Ask, Draft
from shared.engine.sequence import Sequence
from shared.speculative.chains import GuessChain
from shared.speculative.context import ProposerContext
from shared.speculative.drafts import open_heads
from shared.speculative.heads_models import HeadsModel
from shared.speculative.pace import Pace


class HeadsProposer:
    """Implements `shared.engine.proposer.Proposer`."""

    name = "heads"

    def __init__(self, model: HeadsModel) -> None:
        self._model = model
        self._pace = Pace()

    def seconds(self, num_sequences: int) -> float:
        """As observed for the nearest number of sequences."""
        return self._pace.seconds(num_sequences)

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        chains = [GuessChain(ask) for ask in asks]
        known = [(chain, chain.ask.hidden) for chain in chains if chain.ask.hidden is not None]
        active, states = [chain for chain, _ in known], [hidden for _, hidden in known]
        while active:
            before = [len(chain.tokens) for chain in active]
            began = time.perf_counter()
            rows = self._model.extend(active, np.stack(states))
            seconds = time.perf_counter() - began
            most = max(len(chain.tokens) - count for chain, count in zip(active, before, strict=True))
            self._pace.observe(len(active), seconds / max(1, most))
            states = [row for chain, row in zip(active, rows, strict=True) if chain.goes_on]
            active = [chain for chain in active if chain.goes_on]
        return [chain.draft for chain in chains]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""


def make(context: ProposerContext) -> HeadsProposer | None:
    """On the draft that the worker has; None where that is of another kind."""
    model = open_heads(context)
    return None if model is None else HeadsProposer(model)
