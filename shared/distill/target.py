"""The model to learn from: it writes texts, says how likely it found each token, and lends its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.config import EngineSettings
from shared.engine.draws import Draws, no_draws
from shared.engine.engine import Engine
from shared.engine.noise import F32
from shared.engine.runner import Runner, StepResult
from shared.engine.scheduler import SchedulerLimits
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.batch import RaggedStep
from shared.model.source import ModelSource
from shared.worker.build import num_threads, set_torch_threads
from shared.worker.kernels import choose_kernels, make_runner

TOP_K = 64
"""Ids kept of each distribution; the mass of all others is one number."""
_CHUNK = 512
_SEQUENCES = 32


@dataclass(frozen=True, slots=True)
class Distributions:
    """The best ids at each of n positions with their log-probs, and the log of what all other ids have together."""

    ids: npt.NDArray[np.int32]  # [n, TOP_K]
    logprobs: npt.NDArray[np.float16]  # [n, TOP_K]
    log_rest: npt.NDArray[np.float16]  # [n]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Distributions:
        return Distributions(self.ids[rows], self.logprobs[rows], self.log_rest[rows])


_SMALLEST_REST = 1e-4
"""Below this, what is left of one is rounding; a float16 holds its logarithm well."""


def best_of(logits: F32 | Tensor) -> Distributions:
    """Distributions from logits [n, vocab_size] at temperature 1."""
    rows = torch.as_tensor(logits).float()
    values, ids = rows.topk(min(TOP_K, rows.shape[1]))
    logprobs = values - rows.logsumexp(1, keepdim=True)
    rest = (1 - logprobs.exp().sum(1)).clamp(_SMALLEST_REST, 1)
    return Distributions(ids.int().cpu().numpy(), logprobs.half().cpu().numpy(), rest.log().half().cpu().numpy())


def joined(parts: Sequence[Distributions]) -> Distributions:
    """One after the other."""
    return Distributions(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.log_rest for part in parts]),
    )


class _Watching:
    """A runner that leaves the last step's logits where they can be read before the next step."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.cache = runner.cache
        self.logits: F32 = np.zeros((0, 0), dtype=np.float32)

    @property
    def model_s(self) -> float:
        return self._runner.model_s

    @property
    def max_cores(self) -> int:
        return self._runner.max_cores

    @property
    def num_cores(self) -> int:
        return self._runner.num_cores

    def run(self, step: RaggedStep, draws: Draws, num_cores: int = 0) -> StepResult:
        result = self._runner.run(step, draws, num_cores)
        self.logits = result.logits
        return result


class Target:
    """A loaded model with an engine of its own. Not thread-safe."""

    def __init__(
        self, source: ModelSource, settings: EngineSettings, max_tokens: int, progress: Callable[[float], None]
    ) -> None:
        """`max_tokens` bounds prompt and output of one sequence. Blocking; raises as loading a model does."""
        threads = num_threads(settings.threads)
        set_torch_threads(threads)  # the student is torch's, whoever computes the target
        kernels = choose_kernels(source, settings)
        config, block_size = source.config, settings.block_size
        self._layout = KVLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=kernels.cache_dtype(settings),
            k_transposed=kernels.library is not None,
        )
        decoder = kernels.load(source, settings, self._layout, threads, progress)
        num_blocks = 1 + _SEQUENCES * (1 + self._layout.num_blocks(max_tokens))
        cache = KVCache(self._layout, num_blocks, settings.device)
        self._runner = _Watching(make_runner(decoder, cache, settings.device))
        self.source = source
        self.num_sequences = _SEQUENCES

    def engine(self) -> Engine:
        """A fresh engine over the whole cache; `last_logits` are those of its last step."""
        limits = SchedulerLimits(max_num_seqs=_SEQUENCES, max_num_batched_tokens=_CHUNK)
        return Engine(self._runner, limits)

    @property
    def last_logits(self) -> F32:
        return self._runner.logits

    def states(self, tokens: Sequence[int], count: int) -> npt.NDArray[np.float16]:
        """Hidden rows [count, hidden_size] of the last tokens, computed with all before. Uses the cache as `score`."""
        blocks = list(range(1, 1 + self._layout.num_blocks(len(tokens))))
        step = _step([(tokens, 0, blocks)], self._layout.block_size, count)
        return self._runner.run(step, no_draws(count)).hidden.astype(np.float16)

    def score(self, text: Sequence[int], cuts: Sequence[int], drafts: Sequence[Sequence[int]]) -> Distributions:
        """What the target expects after each token of each draft, which goes on from the text's first `cut` tokens.

        The text is computed once; the drafts share its blocks and copy the one they would write into. Rows come draft
        by draft. Uses the cache, so no engine may have anything in it.
        """
        size = self._layout.block_size
        shared = list(range(1, 1 + self._layout.num_blocks(len(text))))
        for first in range(0, max(cuts), _CHUNK):
            chunk = range(first, min(first + _CHUNK, max(cuts)))
            self._runner.run(_step([(text[first : chunk.stop], first, shared)], size, 0), no_draws(0))
        parts, free = [], len(shared) + 1
        for cut, draft in zip(cuts, drafts, strict=True):
            full = cut // size
            needed = self._layout.num_blocks(cut + len(draft)) - full
            blocks = shared[:full] + list(range(free, free + needed))
            free += needed
            parts.append(([*text[full * size : cut], *draft], full * size, blocks))
        step = _step(parts, size, len(drafts[0]))
        return best_of(self._runner.run(step, no_draws(len(step.logit_rows))).logits)


def _step(parts: Sequence[tuple[Sequence[int], int, list[int]]], block_size: int, num_logits: int) -> RaggedStep:
    """Sequences of (tokens, first position, blocks); the last `num_logits` rows of each give logits."""
    positions = [np.arange(first, first + len(tokens)) for tokens, first, _ in parts]
    slots = [
        np.array(blocks)[at // block_size] * block_size + at % block_size
        for at, (_, _, blocks) in zip(positions, parts, strict=True)
    ]
    ends = np.cumsum([len(tokens) for tokens, _, _ in parts])
    width = max(len(blocks) for _, _, blocks in parts)
    return RaggedStep(
        np.concatenate([np.asarray(tokens) for tokens, _, _ in parts]).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(slots).astype(np.int64),
        np.array([0, *ends], dtype=np.int32),
        np.array([blocks + [0] * (width - len(blocks)) for _, _, blocks in parts], dtype=np.int32),
        np.array([at[-1] + 1 for at in positions], dtype=np.int32),
        np.concatenate([np.arange(end - num_logits, end) for end in ends]).astype(np.int32),
    )
