"""How the rows of a step are sampled, as plain arrays that a native call can read."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.batch import rows_with_logits
from shared.engine.filters import is_filtered
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence

ELSEWHERE, GREEDY, GUMBEL, FILTERED = 0, 1, 2, 3
"""`sl_sample` of the C interface: left to the engine, argmax, Gumbel-max over all ids, over what filters leave."""

_Row = tuple[int, int, int, int, float, int, float, float]
_NOTHING: _Row = (ELSEWHERE, 0, 0, 0, 1.0, 0, 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Draws:
    """One entry a logit row. The key of the noise is (seed, ordinal, choice), as in `shared.engine.noise`."""

    ways: npt.NDArray[np.int32]
    seeds: npt.NDArray[np.uint64]
    ordinals: npt.NDArray[np.uint32]
    choices: npt.NDArray[np.uint32]
    temperatures: npt.NDArray[np.float64]
    top_ks: npt.NDArray[np.int32]
    top_ps: npt.NDArray[np.float64]
    min_ps: npt.NDArray[np.float64]


def plan_draws(plan: Sequence_[Scheduled]) -> Draws:
    """Ways for the rows that need nothing but the logits and the noise; all others are left to the sampler."""
    rows: list[_Row] = []
    for item in plan:
        count = len(rows_with_logits(item))
        if count:
            rows += [_NOTHING] * (count - 1)
            rows.append(_last_row(item))
    ways, seeds, ordinals, choices, temperatures, *filters = zip(*rows, strict=True) if rows else ((),) * len(_NOTHING)
    return Draws(
        np.array(ways, dtype=np.int32),
        np.array(seeds, dtype=np.uint64),
        np.array(ordinals, dtype=np.uint32),
        np.array(choices, dtype=np.uint32),
        np.array(temperatures, dtype=np.float64),
        np.array(filters[0], dtype=np.int32),
        np.array(filters[1], dtype=np.float64),
        np.array(filters[2], dtype=np.float64),
    )


def _last_row(item: Scheduled) -> _Row:
    sequence, params = item.sequence, item.sequence.params
    ends = sequence.num_computed + item.num_tokens == len(sequence.tokens)
    if not ends or len(sequence.choices) != 1 or _is_adjusted(sequence):
        return _NOTHING
    key = params.seed, sequence.num_output, sequence.choices[0]
    if params.is_greedy:
        return GREEDY, *key, 1.0, 0, 1.0, 0.0
    way = FILTERED if is_filtered(params) else GUMBEL
    return way, *key, params.temperature, params.top_k, params.top_p, params.min_p


def _is_adjusted(sequence: Sequence) -> bool:
    """Whether a bias, penalty or mask comes between the logits and the draw."""
    params = sequence.params
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    masked = params.stop_ids and sequence.num_output < params.min_tokens
    return bool(params.logit_bias or penalised or masked)
