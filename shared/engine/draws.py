"""How the rows of a step are sampled, as plain arrays that a native call can read."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.batch import rows_with_logits
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence

ELSEWHERE, GREEDY, GUMBEL = 0, 1, 2
"""`sl_sample` of the C interface: left to the engine, argmax, Gumbel-max over the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Draws:
    """One entry a logit row. The key of the noise is (seed, ordinal, choice), as in `shared.engine.noise`."""

    ways: npt.NDArray[np.int32]
    seeds: npt.NDArray[np.uint64]
    ordinals: npt.NDArray[np.uint32]
    choices: npt.NDArray[np.uint32]
    temperatures: npt.NDArray[np.float64]


def plan_draws(plan: Sequence_[Scheduled]) -> Draws:
    """Ways for the rows that need nothing but the logits and the noise; all others are left to the sampler."""
    rows: list[tuple[int, int, int, int, float]] = []
    for item in plan:
        count = len(rows_with_logits(item))
        if count:
            rows += [(ELSEWHERE, 0, 0, 0, 1.0)] * (count - 1)
            rows.append(_last_row(item))
    ways, seeds, ordinals, choices, temperatures = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Draws(
        np.array(ways, dtype=np.int32),
        np.array(seeds, dtype=np.uint64),
        np.array(ordinals, dtype=np.uint32),
        np.array(choices, dtype=np.uint32),
        np.array(temperatures, dtype=np.float64),
    )


def _last_row(item: Scheduled) -> tuple[int, int, int, int, float]:
    sequence, params = item.sequence, item.sequence.params
    ends = sequence.num_computed + item.num_tokens == len(sequence.tokens)
    if not ends or len(sequence.choices) != 1 or not _is_plain(sequence):
        return ELSEWHERE, 0, 0, 0, 1.0
    way = GREEDY if params.is_greedy else GUMBEL
    return way, params.seed, sequence.num_output, sequence.choices[0], 1.0 if params.is_greedy else params.temperature


def _is_plain(sequence: Sequence) -> bool:
    """Whether the draw reads the logits as they are: no bias, penalty, mask or filter."""
    params = sequence.params
    adjusted: object = params.logit_bias or params.presence_penalty or params.frequency_penalty
    adjusted = (
        adjusted or params.repetition_penalty != 1.0 or (params.stop_ids and sequence.num_output < params.min_tokens)
    )
    filtered = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
    return not adjusted and (params.is_greedy or not filtered)
