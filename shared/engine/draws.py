"""How the rows of a step are sampled, as plain arrays that a native call can read."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.adjustments import Adjustments, adjustments_of, joined
from shared.engine.batch import rows_with_logits
from shared.engine.filters import is_filtered
from shared.engine.sampler import is_adjusted
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
    adjust_starts: npt.NDArray[np.int64]  # [num_logit_rows + 1]
    adjust_ids: npt.NDArray[np.int32]
    adjust_kinds: npt.NDArray[np.int32]
    adjust_values: npt.NDArray[np.float32]


def plan_draws(plan: Sequence_[Scheduled]) -> Draws:
    """Ways for the rows of sequences with one choice whose tokens end here; all others are left to the sampler.

    The row after a draft's tokens is drawn as it would be had they been sampled: with their ordinals and penalties.
    """
    rows = _Rows()
    for item in plan:
        count = len(rows_with_logits(item))
        if not count:
            continue
        num_drawn = 1 + len(item.draft)
        rows.skip(count - num_drawn)
        for ahead in range(num_drawn):
            rows.add(item, ahead)
    return rows.as_draws()


def plan_guesses(guessed: Sequence_[tuple[Sequence, tuple[int, ...]]]) -> Draws:
    """One row for each sequence: as the token is drawn that comes after its tokens and these guesses behind them."""
    rows = _Rows()
    for sequence, guesses in guessed:
        rows.add(Scheduled(sequence, sequence.num_pending, guesses), len(guesses))
    return rows.as_draws()


def no_draws(num_rows: int) -> Draws:
    """For steps whose logits alone are wanted."""
    rows = _Rows()
    rows.skip(num_rows)
    return rows.as_draws()


class _Rows:
    """Collects rows one after the other, and what is changed of the logits of each."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._starts = [0]
        self._adjustments: list[Adjustments] = []

    def skip(self, count: int) -> None:
        """Rows that nobody draws here."""
        self._rows += [_NOTHING] * count
        self._starts += [self._starts[-1]] * count

    def add(self, item: Scheduled, ahead: int) -> None:
        """The row behind the item's tokens and the first `ahead` of its draft."""
        sequence, row, end = item.sequence, _row(item, ahead), self._starts[-1]
        self._rows.append(row)
        if row is not _NOTHING and is_adjusted(sequence.params, sequence.num_output + ahead):
            self._adjustments.append(adjustments_of(sequence.sample_input(sequence.choices[0], item.draft[:ahead])))
            end += len(self._adjustments[-1].ids)
        self._starts.append(end)

    def as_draws(self) -> Draws:
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * len(_NOTHING)
        ways, seeds, ordinals, choices, temperatures, top_ks, top_ps, min_ps = columns
        changes = joined(self._adjustments)
        return Draws(
            np.array(ways, dtype=np.int32),
            np.array(seeds, dtype=np.uint64),
            np.array(ordinals, dtype=np.uint32),
            np.array(choices, dtype=np.uint32),
            np.array(temperatures, dtype=np.float64),
            np.array(top_ks, dtype=np.int32),
            np.array(top_ps, dtype=np.float64),
            np.array(min_ps, dtype=np.float64),
            np.array(self._starts, dtype=np.int64),
            changes.ids,
            changes.kinds,
            changes.values,
        )


def _row(item: Scheduled, ahead: int) -> _Row:
    """The row of a sequence's last token, or of a token of its draft so many further on."""
    sequence, params = item.sequence, item.sequence.params
    ends = sequence.num_computed + item.num_tokens == len(sequence.tokens)
    if not ends or len(sequence.choices) != 1:
        return _NOTHING
    key = params.seed, sequence.num_output + ahead, sequence.choices[0]
    if params.is_greedy:
        return GREEDY, *key, 1.0, 0, 1.0, 0.0
    way = FILTERED if is_filtered(params) else GUMBEL
    return way, *key, params.temperature, params.top_k, params.top_p, params.min_p
