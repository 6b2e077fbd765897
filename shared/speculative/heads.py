"""Guesses by heads on the target's own hidden rows (Medusa, arXiv 2401.10774), each knowing the guess before it.

A guess is made of the hidden row that the last token was drawn from and of that token; the next one of the heads' own
row and of the guess (as in Hydra, arXiv 2402.05109, with one set of weights for all places, as in arXiv 2403.09919).
There is no cache: nothing has to be computed for a prompt, sent with a hand-off or kept for a sequence. Draws have the
target's noise and the request's filters, penalties and bias.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_
from dataclasses import replace
from functools import cache

import numpy as np

from shared.cores import CoreShare, core_share
from shared.engine.draws import plan_guesses
from shared.engine.noise import F32
from shared.engine.proposer import Ask, Draft
from shared.engine.runner import place_of
from shared.engine.sequence import Sequence
from shared.model.batch import Int32, RaggedStep
from shared.model.draft_kind import DraftKind
from shared.model.native import NativeDecoder
from shared.speculative.context import ProposerContext
from shared.speculative.drafts import open_draft
from shared.speculative.pace import Pace, confidence

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

    def __init__(self, model: NativeDecoder, head_ids: Int32, share: CoreShare | None = None) -> None:
        self._model = model
        self._share = share
        self._cores = None if share is None else place_of(share)
        self._head_ids = head_ids
        self._pace = Pace()

    def seconds(self, num_sequences: int) -> float:
        """As observed for the nearest number of sequences."""
        return self._pace.seconds(num_sequences)

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
        step = _step([chain.last for chain in chains])
        alone = len(chains) == 1  # waking another thread takes as long as it would save
        logits, drawn, hidden = self._model.run(
            *(step, None, draws), threads=int(alone), cores=None if alone else self._cores, states=states
        )
        for chain, row, token in zip(chains, logits, drawn.tolist(), strict=True):
            chain.add(token, confidence(row, self._head_ids, token))
        return list(hidden)


def _step(tokens: list[int]) -> RaggedStep:
    """One row for each token."""
    return replace(_rows(len(tokens)), token_ids=np.array(tokens, dtype=np.int32))


@cache
def _rows(count: int) -> RaggedStep:
    """Where rows stand makes no difference without attention."""
    rows, nowhere = np.arange(count + 1, dtype=np.int32), np.zeros(count, dtype=np.int32)
    slots, tables = np.zeros(count, dtype=np.int64), np.zeros((count, 1), dtype=np.int32)
    return RaggedStep(nowhere, nowhere, slots, rows, tables, nowhere, rows[:-1].copy())


def make(context: ProposerContext) -> HeadsProposer | None:
    """On the draft that the worker has; None where that is of another kind or cannot be computed here."""
    opened = open_draft(context, DraftKind.HEADS)
    if opened is None:
        return None
    draft, model = opened
    return HeadsProposer(model, draft.head_ids, core_share())
