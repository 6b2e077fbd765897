"""Heads on the CPU kernels and on torch, as the proposer asks them: more guesses for chains of them."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import Protocol

import torch

from shared.cores import CoreShare
from shared.engine.draws import plan_guesses
from shared.engine.noise import F32
from shared.engine.runner import place_of
from shared.engine.sampler import is_adjusted
from shared.model.native_heads import NativeHeads
from shared.model.torch_draft import TorchHeads
from shared.speculative.chains import LEAST_REACH, GuessChain
from shared.speculative.draft_vocabulary import DraftVocabulary


class HeadsModel(Protocol):
    """Keeps nothing from one call to the next."""

    def extend(self, chains: Sequence_[GuessChain], states: F32) -> F32:
        """Make the next guess of each chain, which all go on, or several; the rows to go on from behind them.

        `states` [len(chains), hidden_size] are the rows before the chains' last tokens. Raises ValueError for rows of
        another width.
        """
        ...


class HeadsOnKernels:
    """Whole chains in one call, on the cores that the worker has."""

    def __init__(self, model: NativeHeads, share: CoreShare | None) -> None:
        self._model = model
        self._share = share
        self._cores = None if share is None else place_of(share)

    def extend(self, chains: Sequence_[GuessChain], states: F32) -> F32:
        guesses = self._model.guess(
            [chain.last for chain in chains],
            states,
            plan_guesses([(chain.ask.sequence, chain.tokens) for chain in chains]),
            [_num_places(chain) for chain in chains],
            [chain.reach for chain in chains],
            least_reach=LEAST_REACH,
            cores=self._cores,
        )
        for chain, tokens, sureness in zip(chains, guesses.tokens.tolist(), guesses.sureness.tolist(), strict=True):
            count = tokens.index(-1) if -1 in tokens else len(tokens)
            chain.extend(tokens[:count], sureness[:count])
        return guesses.states


class HeadsOnTorch:
    """A guess at a time, drawn by the sampler."""

    def __init__(self, model: TorchHeads, vocabulary: DraftVocabulary, device: torch.device) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._device = device

    def extend(self, chains: Sequence_[GuessChain], states: F32) -> F32:
        ids = torch.tensor([chain.last for chain in chains], device=self._device)
        rows = self._model.forward(torch.from_numpy(states).to(self._device), ids)
        for chain, logits in zip(chains, self._model.logits(rows).cpu().numpy(), strict=True):
            sequence = chain.ask.sequence
            token = self._vocabulary.sample(logits, sequence.sample_input(sequence.choices[0], chain.tokens))
            chain.extend([token], [self._vocabulary.confidence(logits, token)])
        hidden: F32 = rows.float().cpu().numpy()
        return hidden


def _num_places(chain: GuessChain) -> int:
    """As many as are wanted; one where the guesses before it change more of a draw than its ordinal."""
    sequence = chain.ask.sequence
    return 1 if is_adjusted(sequence.params, sequence.num_output + len(chain.tokens)) else chain.num_left
