"""Heads on the CPU kernels: chains of guesses behind rows of their target, one native call for all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.kernels.library import DRAW_ARRAYS, CChains, CCores, CStep, Isa, Library
from shared.model.batch import Int32
from shared.model.config import ModelConfig
from shared.model.native import F32, Draws, point
from shared.model.native_weights import NativeWeights


@dataclass(frozen=True, slots=True)
class Guesses:
    """Behind n rows: `tokens` and `sureness` [n, places], with -1 for a token where a chain has ended.

    Sureness is the probability at temperature 1 and before filters. `states` [n, hidden_size] are the rows behind the
    last guesses.
    """

    tokens: Int32
    sureness: F32
    states: F32


class NativeHeads:
    """Keeps nothing from one call to the next. Not thread-safe."""

    def __init__(self, config: ModelConfig, weights: NativeWeights, library: Library, threads: int, isa: Isa) -> None:
        self._config = config
        self._weights = weights  # the engine reads them
        self._library = library
        self._logits: F32 = np.empty((0, weights.model.vocab_size), dtype=np.float32)
        self._engine = library.create(weights.model, threads, isa)

    def __del__(self) -> None:
        if getattr(self, "_engine", 0):
            self._library.destroy(self._engine)

    def guess(
        self,
        token_ids: Sequence[int],
        states: F32,
        draws: Draws,
        num_places: Sequence[int],
        reach: Sequence[float],
        *,
        least_reach: float,
        cores: CCores | None = None,
    ) -> Guesses:
        """At most `num_places` guesses behind each token, whose row before it is in `states` [n, hidden_size].

        `draws` are those of the first guesses; the others' ordinals count on, without adjustments. A chain ends where
        the product of its sureness and its `reach` is no more than `least_reach`. Raises ValueError for rows of
        another width and IndexError for a token that there is not.
        """
        count = len(token_ids)
        if states.shape != (count, self._config.hidden_size):
            raise ValueError(f"states are {states.shape}, not rows of the model's width")
        ids = np.array(token_ids, dtype=np.int32)
        if int(ids.view(np.uint32).max()) >= self._config.vocab_size:  # a negative number is a large one there
            raise IndexError(f"a token id is outside 0 to {self._config.vocab_size - 1}")
        if count > len(self._logits):
            self._logits = np.empty((count, self._logits.shape[1]), dtype=np.float32)
        first = CStep(count, count, 1, count, 0)
        in_step = {"token_ids": ids, "logits": self._logits, "sample": draws.ways, **_places(count)}
        in_step |= {name: getattr(draws, name) for name in DRAW_ARRAYS}
        point(first, in_step)
        first.cores = ctypes.addressof(cores) if cores else None
        places = max(num_places)
        guesses = Guesses(
            np.empty((count, places), dtype=np.int32),
            np.zeros((count, places), dtype=np.float32),
            np.array(states, dtype=np.float32),
        )
        chains = CChains(ctypes.pointer(first), places, least_reach)
        arrays: dict[str, npt.NDArray[Any]] = {
            "num_places": np.array(num_places, dtype=np.int32),
            "reach": np.array(reach, dtype=np.float32),
            "tokens": guesses.tokens,
            "sureness": guesses.sureness,
            "states": guesses.states,
        }
        point(chains, arrays)
        self._library.guess(self._engine, chains)
        return guesses


@cache
def _places(count: int) -> dict[str, npt.NDArray[Any]]:
    """Where rows stand makes no difference without attention."""
    rows, nowhere = np.arange(count + 1, dtype=np.int32), np.zeros(count, dtype=np.int32)
    return {
        "positions": nowhere,
        "slots": np.zeros(count, dtype=np.int64),
        "starts": rows,
        "block_tables": nowhere,
        "logit_rows": rows,
    }
