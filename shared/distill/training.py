"""Steps of training, one like the other: a batch, a loss, Adam; and the measure of what they are good for.

Everything a step needs follows from its number and the seed, so a run that was interrupted needs no more than the
weights, Adam's averages and that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.distill.losses import (
    Expected,
    acceptance,
    expected_in_head,
    forward_kl,
    greedy_agreement,
    place_table,
    total_variation,
)
from shared.distill.options import DistillOptions
from shared.distill.rows import Batch, Piece, make_batch, pack
from shared.distill.student import Student
from shared.distill.texts import Text

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_WARMUP = 0.03
_LAST_RATE = 0.05
_TEST_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class Quality:
    """On texts that were never trained on: `acceptance` at temperature 1, `greedy` at 0, mean `loss` in nats."""

    acceptance: float
    greedy: float
    loss: float


def rate_at(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then a cosine down to a twentieth."""
    rise = max(1, round(_WARMUP * num_steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, num_steps - rise)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Trainer:
    """Owns the student's weights and Adam's averages while they change."""

    def __init__(self, student: Student, options: DistillOptions, num_steps: int) -> None:
        self.student = student
        self.step = 0
        self.num_steps = num_steps
        self._options = options
        self._device = student.head.device
        self._table = place_table(student.head_ids.cpu().numpy(), student.config.vocab_size)
        self.optimizer = torch.optim.Adam(student.parameters(), options.learning_rate, _BETAS, fused=True)

    def learn(self, packed: Sequence[Sequence[Piece]], *, varied: bool = False) -> float:
        """One step on these rows; the mean loss. `varied` compares by total variation instead of forward KL."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._options.learning_rate * rate_at(self.step, self.num_steps)
        logits, expected = self._run(self._batch(packed))
        loss = (total_variation if varied else forward_kl)(logits, expected).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def test(self, texts: Sequence[Text]) -> Quality:
        """Measure on the first of these texts, about `_TEST_POSITIONS` tokens."""
        rows = pack(_first(texts, _TEST_POSITIONS), self._options.row_tokens)
        parts = []
        for first in range(0, len(rows), self._options.batch_rows):
            logits, expected = self._run(self._batch(rows[first : first + self._options.batch_rows]))
            parts.append(
                torch.stack([measure(logits, expected) for measure in (acceptance, greedy_agreement, forward_kl)])
            )
        accepted, greedy, loss = torch.cat(parts, 1).double().mean(1).tolist()
        return Quality(accepted, greedy, loss)

    def _batch(self, packed: Sequence[Sequence[Piece]]) -> Batch:
        return make_batch(packed, self._options.row_tokens, self._device)

    def _run(self, batch: Batch) -> tuple[Tensor, Expected]:
        """Products in bfloat16, everything else in float32: twice as fast, and the weights themselves stay float32."""
        with torch.autocast(self._device.type, torch.bfloat16):
            hidden, _ = self.student(batch.token_ids, batch.positions, batch.mask)
            logits = self.student.logits(hidden.flatten(0, 1)[batch.chosen])
        return logits, expected_in_head(batch.expected, self._table, self._device)


def _first(texts: Sequence[Text], num_positions: int) -> list[Piece]:
    pieces, positions = [], 0
    for text in texts:
        if positions >= num_positions:
            break
        pieces.append(Piece(text))
        positions += text.num_generated
    return pieces
