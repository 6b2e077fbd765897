"""Sampling as a pure function of (logits, parameters, seed, choice, output ordinal).

No state, no random generator: Gumbel-max with the keyed noise of `shared.engine.noise`. A request therefore
draws the same tokens on any worker, in any batch, before and after a crash, and under speculation.

Order: logit_bias, penalties, min_tokens mask, temperature, top_k, top_p, min_p, then the largest
float32(logit / T) + G; ties go to the lowest id. What the filters keep is defined in `shared.engine.filters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.engine import noise
from shared.engine.filters import is_filtered, surviving_ids, top_k_ids
from shared.engine.noise import F32, Ids
from shared.protocol.messages import TokenLogprob
from shared.protocol.sampling import SamplingParams

_ROWS_TO_TRY = 32
"""How many best upper bounds are evaluated exactly before pruning an unfiltered row."""


@dataclass(frozen=True, slots=True)
class SampleInput:
    """Everything one draw depends on beside the logits.

    `prompt_ids` is the request's original prompt and `output_ids` what this choice has produced, also before a
    migration; `len(output_ids)` is the ordinal that keys the noise.
    """

    params: SamplingParams
    choice: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


def sample(logits: F32, request: SampleInput) -> int:
    """Draw one token id from float32 `logits` [vocab_size]; the array is left as it was."""
    params = request.params
    logits = adjust(logits, request)
    if params.is_greedy:
        return int(np.argmax(logits))
    scaled = (logits.astype(np.float64) / params.temperature).astype(np.float32)
    ordinal = len(request.output_ids)
    if not is_filtered(params):
        return draw_unfiltered(scaled, params.seed, request.choice, ordinal)
    return draw(scaled, surviving_ids(scaled, params), params.seed, request.choice, ordinal)


def adjust(logits: F32, request: SampleInput) -> F32:
    """Apply logit_bias, penalties and the min_tokens mask; copies only when something changes."""
    params = request.params
    if not is_adjusted(params, len(request.output_ids)):
        return logits
    logits = logits.copy()
    for token_id, bias in params.logit_bias:
        logits[token_id] += np.float32(bias)
    _penalise(logits, request)
    if len(request.output_ids) < params.min_tokens:
        logits[list(params.stop_ids)] = -np.inf
    return logits


def is_adjusted(params: SamplingParams, num_output: int) -> bool:
    """Whether a bias, a penalty or the min_tokens mask comes between the logits and the draw."""
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    masked = params.stop_ids and num_output < params.min_tokens
    return bool(params.logit_bias or penalised or masked)


def _penalise(logits: F32, request: SampleInput) -> None:
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*request.prompt_ids, *request.output_ids], dtype=np.int64))
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if request.output_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(request.output_ids, dtype=np.int64), return_counts=True)
        logits[ids] -= counts.astype(np.float32) * np.float32(params.frequency_penalty)
        logits[ids] -= np.float32(params.presence_penalty)


def draw(scaled: F32, ids: Ids, seed: int, choice: int, ordinal: int) -> int:
    """Gumbel-max over the given ascending ids only: noise is keyed by id, so the others need none."""
    scores = scaled[ids] + noise.gumbel(noise.random_bits_of(ids, seed, choice, ordinal))
    return int(ids[np.argmax(scores)])


def draw_over_all(scaled: F32, seed: int, choice: int, ordinal: int) -> int:
    """The slow, obvious version of `draw_unfiltered`: noise for the whole vocabulary."""
    return int(np.argmax(scaled + noise.gumbel(noise.random_bits(len(scaled), seed, choice, ordinal))))


def draw_unfiltered(scaled: F32, seed: int, choice: int, ordinal: int) -> int:
    """Gumbel-max over all ids, taking logarithms only for those that can still win.

    An upper bound of each score comes from the random bits alone; ids whose bound is below an exact
    score already seen cannot be the maximum.
    """
    bits = noise.random_bits(len(scaled), seed, choice, ordinal)
    bounds = scaled + noise.gumbel_upper_bound(bits)
    best = (
        np.argpartition(bounds, -_ROWS_TO_TRY)[-_ROWS_TO_TRY:] if len(bounds) > _ROWS_TO_TRY else np.arange(len(bounds))
    )
    reached = (scaled[best] + noise.gumbel(bits[best])).max()
    ids = np.flatnonzero(bounds >= reached)
    return int(ids[np.argmax(scaled[ids] + noise.gumbel(bits[ids]))])


def token_logprob(logits: F32, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of `token_id` under the model's own (unadjusted) logits, and the `num_top` best ids."""
    values = logits.astype(np.float64)
    peak = values.max()
    log_total = peak + np.log(np.exp(values - peak).sum())
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = top_k_ids(logits, min(num_top, len(logits)))
        ids = ids[np.lexsort((ids, -values[ids]))]
        top = tuple((int(i), float(values[i] - log_total)) for i in ids)
    return TokenLogprob(float(values[token_id] - log_total), top)
