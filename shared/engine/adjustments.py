"""What `shared.engine.sampler.adjust` does to a row of logits, as a short list that a native call can follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.sampler import SampleInput

ADD, PENALISE = 0, 1
"""`sl_adjust` of the C interface: add the value; divide by it what is positive and multiply by it what is not."""


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Changes of single logits, to be made one after the other in float32; arrays of one length."""

    ids: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


def adjustments_of(request: SampleInput) -> Adjustments:
    """logit_bias, repetition_penalty, frequency_penalty, presence_penalty and the min_tokens mask, in this order."""
    params, output_ids = request.params, request.output_ids
    changes = [_change([token_id], ADD, bias) for token_id, bias in params.logit_bias]
    if params.repetition_penalty != 1.0:
        changes.append(_change({*request.prompt_ids, *output_ids}, PENALISE, params.repetition_penalty))
    if output_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(output_ids, dtype=np.int32), return_counts=True)
        frequencies = counts.astype(np.float32) * np.float32(params.frequency_penalty)
        changes.append(Adjustments(ids, np.full(len(ids), ADD, dtype=np.int32), -frequencies))
        changes.append(_change(ids.tolist(), ADD, -params.presence_penalty))
    if len(output_ids) < params.min_tokens:
        changes.append(_change(params.stop_ids, ADD, -np.inf))
    return joined(changes)


def joined(parts: Sequence[Adjustments]) -> Adjustments:
    """One list after the other."""
    if not parts:
        return Adjustments(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    return Adjustments(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def _change(token_ids: Sequence[int] | set[int], kind: int, value: float) -> Adjustments:
    ids = np.fromiter(token_ids, dtype=np.int32, count=len(token_ids))
    return Adjustments(ids, np.full(len(ids), kind, dtype=np.int32), np.full(len(ids), value, dtype=np.float32))
