"""Heads on the CPU kernels and on torch, as the proposer asks them: one more token behind each of some rows."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import replace
from functools import cache
from typing import Protocol

import numpy as np
import torch

from shared.cores import CoreShare
from shared.engine.draws import Draws
from shared.engine.noise import F32
from shared.engine.runner import place_of
from shared.model.batch import Int32, RaggedStep
from shared.model.native import NativeDecoder
from shared.model.torch_draft import TorchHeads


class HeadsModel(Protocol):
    """Keeps nothing from one call to the next."""

    def run(self, tokens: Sequence_[int], states: F32, draws: Draws) -> tuple[F32, Int32, F32]:
        """Logits [n, number of ids], the tokens drawn (-1 where none was) and the rows to go on from.

        `states` [n, hidden_size] are the rows before the tokens. Logits may be overwritten by the next call.
        """
        ...


class HeadsOnKernels:
    """Draws too, on the cores that the worker has."""

    def __init__(self, model: NativeDecoder, share: CoreShare | None) -> None:
        self._model = model
        self._share = share
        self._cores = None if share is None else place_of(share)

    def run(self, tokens: Sequence_[int], states: F32, draws: Draws) -> tuple[F32, Int32, F32]:
        step = replace(_rows(len(tokens)), token_ids=np.array(tokens, dtype=np.int32))
        alone = len(tokens) == 1  # waking another thread takes as long as it would save
        cores = None if alone else self._cores
        return self._model.run(step, None, draws, threads=int(alone), cores=cores, states=states)


class HeadsOnTorch:
    """Leaves the draws to the caller."""

    def __init__(self, model: TorchHeads, device: torch.device) -> None:
        self._model = model
        self._device = device

    def run(self, tokens: Sequence_[int], states: F32, draws: Draws) -> tuple[F32, Int32, F32]:
        ids = torch.tensor(tokens, device=self._device)
        rows = self._model.forward(torch.from_numpy(states).to(self._device), ids)
        logits = self._model.logits(rows).cpu().numpy()
        return logits, np.full(len(tokens), -1, dtype=np.int32), rows.float().cpu().numpy()


@cache
def _rows(count: int) -> RaggedStep:
    """Where rows stand makes no difference without attention."""
    rows, nowhere = np.arange(count + 1, dtype=np.int32), np.zeros(count, dtype=np.int32)
    slots, tables = np.zeros(count, dtype=np.int64), np.zeros((count, 1), dtype=np.int32)
    return RaggedStep(nowhere, nowhere, slots, rows, tables, nowhere, rows[:-1].copy())
