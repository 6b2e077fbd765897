"""The tokens that a draft can say, and what its logits say of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.engine.noise import F32
from shared.engine.sampler import SampleInput, sample
from shared.model.draft import Int32


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Logit i is that of `ids[i]`; ids ascend, and are some of the target's `size`."""

    ids: Int32
    size: int

    def sample(self, logits: F32, request: SampleInput) -> int:
        """What the sampler draws if no other token is possible; kernels that draw find the same."""
        everything = np.full(self.size, -np.inf, dtype=np.float32)
        everything[self.ids] = logits
        return sample(everything, request)

    def confidence(self, logits: F32, token: int) -> float:
        """The probability of a token at temperature 1 and before filters; 0 if the draft cannot say it."""
        place = int(np.searchsorted(self.ids, token))
        if place == len(self.ids) or self.ids[place] != token:
            return 0.0
        weights = np.exp(logits - logits.max())
        return float(weights[place] / weights.sum())
