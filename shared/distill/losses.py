"""How far the student's distribution is from what the target expects, and how often its drafts will be taken.

The target is known by its best ids and the mass of all others; the student knows the ids of its head only. What both
know is compared id by id, everything else as one more outcome: the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.distill.target import Distributions


@dataclass(frozen=True, slots=True)
class Expected:
    """Distributions as the losses read them, on the student's device.

    `places` are indices into the student's head, 0 where the id is not in it; there `probs` is 0 and its mass is in
    `rest`. `best` is the place of the likeliest id, -1 where it is not in the head.
    """

    places: Tensor  # int64 [n, k]
    probs: Tensor  # float32 [n, k]
    rest: Tensor  # float32 [n]
    best: Tensor  # int64 [n]


def place_table(head_ids: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.int64]:
    """For each id of the vocabulary its place in the head, -1 for none."""
    table = np.full(vocab_size, -1, dtype=np.int64)
    table[head_ids] = np.arange(len(head_ids))
    return table


def expected_in_head(expected: Distributions, table: npt.NDArray[np.int64], device: torch.device) -> Expected:
    """Move the mass of ids that the head lacks to the rest."""
    places = table[expected.ids]
    probs = np.where(places >= 0, np.exp(expected.logprobs.astype(np.float32)), 0)
    lacking = np.where(places < 0, np.exp(expected.logprobs.astype(np.float32)), 0).sum(1)
    rest = np.exp(expected.log_rest.astype(np.float32)) + lacking
    tensors = (np.maximum(places, 0), probs.astype(np.float32), rest.astype(np.float32), places[:, 0])
    return Expected(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in tensors))


_SMALLEST = 1e-6


def forward_kl(logits: Tensor, expected: Expected) -> Tensor:
    """KL(target || student) over the shared ids and the rest, one value a row."""
    logs = logits.log_softmax(-1).gather(1, expected.places)
    rest = _rest_of(logs, expected)
    divergence: Tensor = torch.special.xlogy(expected.probs, expected.probs) - expected.probs * logs
    of_rest: Tensor = torch.special.xlogy(expected.rest, expected.rest) - expected.rest * rest.log()
    return divergence.sum(1) + of_rest


def reverse_kl(logits: Tensor, expected: Expected) -> Tensor:
    """KL(student || target) over the same outcomes."""
    logs = logits.log_softmax(-1).gather(1, expected.places)
    known = expected.probs > 0
    probs = torch.where(known, logs.exp(), 0)
    rest = _rest_of(logs, expected)
    theirs = expected.probs.clamp_min(_SMALLEST).log()
    return (probs * (logs - theirs)).sum(1) + rest * (rest.log() - expected.rest.clamp_min(_SMALLEST).log())


def total_variation(logits: Tensor, expected: Expected) -> Tensor:
    """1 - acceptance of each row; the gradient raises the ids that the student rates too low."""
    return 1 - acceptance(logits, expected)


def acceptance(logits: Tensor, expected: Expected) -> Tensor:
    """Sum of min(p, q) over the shared ids: how often a drafted token is taken at temperature 1, at least."""
    probs = logits.softmax(-1).gather(1, expected.places)
    return torch.minimum(probs, expected.probs).sum(1)


def greedy_agreement(logits: Tensor, expected: Expected) -> Tensor:
    """1 where both like the same id best: how often a drafted token is taken at temperature 0."""
    return (logits.argmax(-1) == expected.best).float()


def _rest_of(logs: Tensor, expected: Expected) -> Tensor:
    """The student's mass outside the shared ids."""
    shared = torch.where(expected.probs > 0, logs.exp(), 0).sum(1)
    return (1 - shared).clamp_min(_SMALLEST)


LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation}
