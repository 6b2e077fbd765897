"""Runs one step on the model: int arrays in; logits of the asked rows out, or the tokens drawn from them."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from shared.cores import CoreShare
from shared.engine.draws import Draws
from shared.engine.noise import F32
from shared.kernels.library import CCores
from shared.kv.cache import KVCache
from shared.model.batch import AttentionGroup, ForwardBatch, Int32, Int64, RaggedStep, padded_rows
from shared.model.language_model import ForwardPass
from shared.model.native import NativeDecoder


@dataclass(frozen=True, slots=True)
class StepResult:
    """`logits` float32 [num_logit_rows, vocab_size] on the host; `drawn` [num_logit_rows], -1 where nobody drew.

    `hidden` float32 [num_logit_rows, hidden_size] are the rows the logits were made of.
    """

    logits: F32
    drawn: Int32
    hidden: F32


class Runner(Protocol):
    """Owns the model and the KV cache tensors; knows nothing of sequences."""

    cache: KVCache

    @property
    def model_s(self) -> float:
        """Processor time the calling thread has spent in the model; the rest of a step's is Python around it."""
        ...

    @property
    def max_cores(self) -> int:
        """Cores a step may have; 1 where their number makes no difference that the runner knows of."""
        ...

    @property
    def num_cores(self) -> int:
        """Cores a step would have now, beside the other workers of this machine."""
        ...

    def run(self, step: RaggedStep, draws: Draws, num_cores: int = 0) -> StepResult:
        """Compute one step, on so many cores where they are to be fewer than it could have.

        A runner may draw the rows `draws` describes; what it does not draw, the engine does.
        """
        ...


class TorchRunner:
    """Plain torch, on any device; leaves all draws to the engine."""

    def __init__(self, model: ForwardPass, cache: KVCache, device: str) -> None:
        self._model = model
        self._device = torch.device(device)
        self.cache = cache
        self.model_s = 0.0
        self.max_cores = self.num_cores = 1

    @torch.inference_mode()
    def run(self, step: RaggedStep, draws: Draws, num_cores: int = 0) -> StepResult:
        began = time.thread_time()
        try:
            return self._compute(step)
        finally:
            self.model_s += time.thread_time() - began

    def _compute(self, step: RaggedStep) -> StepResult:
        hidden = self._model.forward(self._batch(step), self.cache.data)
        nothing = np.full(len(step.logit_rows), -1, dtype=np.int32)
        if not len(step.logit_rows):
            none = np.zeros((0, 0), dtype=np.float32)
            return StepResult(none, nothing, none)
        rows = hidden[self._tensor(step.logit_rows)]
        return StepResult(self._model.logits(rows).float().cpu().numpy(), nothing, rows.float().cpu().numpy())

    def _batch(self, step: RaggedStep) -> ForwardBatch:
        """The step's rows padded with rows of block 0, its sequences grouped by their number of new tokens."""
        missing = padded_rows(len(step.token_ids), self._model.row_pad) - len(step.token_ids)
        token_ids, positions, slots = (
            self._tensor(np.pad(array.astype(np.int64), (0, missing)))
            for array in (step.token_ids, step.positions, step.slots)
        )
        counts = np.diff(step.starts)
        groups = tuple(self._group(step, counts, int(length)) for length in np.unique(counts))
        return ForwardBatch(token_ids, positions, slots, groups)

    def _group(self, step: RaggedStep, counts: Int32, query_len: int) -> AttentionGroup:
        members = np.flatnonzero(counts == query_len)
        context_lens = step.context_lens[members]
        block_size = self.cache.layout.block_size
        width = -(-int(context_lens.max()) // block_size)
        return AttentionGroup(
            rows=self._tensor((step.starts[members][:, None] + np.arange(query_len)).reshape(-1)),
            num_seqs=len(members),
            query_len=query_len,
            block_tables=self._tensor(step.block_tables[members, :width]),
            context_lens=self._tensor(context_lens),
        )

    def _tensor(self, array: Int32 | Int64) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)


class NativeRunner:
    """The CPU kernels: one call a step, draws included."""

    def __init__(self, model: NativeDecoder, cache: KVCache, share: CoreShare | None = None) -> None:
        self._model = model
        self._share = share
        self._cores = None if share is None else place_of(share)
        self.cache = cache

    @property
    def model_s(self) -> float:
        return self._model.run_s

    @property
    def max_cores(self) -> int:
        return self._model.num_threads

    @property
    def num_cores(self) -> int:
        if self._share is None:
            return self._model.num_threads
        return min(self._model.num_threads, len(self._share.cores(time.monotonic_ns())))

    def run(self, step: RaggedStep, draws: Draws, num_cores: int = 0) -> StepResult:
        cores = None if 0 < num_cores < self.max_cores else self._cores
        with nullcontext() if self._share is None else self._share.step():
            return StepResult(*self._model.run(step, self.cache.data, draws, threads=num_cores, cores=cores))


def place_of(share: CoreShare) -> CCores:
    """A share as the kernels read it; valid as long as the share is."""
    words = share.board.words
    return CCores(words.ctypes.data, len(words), share.slot, share.num_cores)
