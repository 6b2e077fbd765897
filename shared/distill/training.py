"""Steps of training, one like the other: a batch, a loss, Adam; and the measure of what they are good for.

Everything a step needs follows from its number and the seed, so a run that was interrupted needs no more than the
weights, Adam's averages and that number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor, nn

from shared.distill.lessons import BatchT, Course
from shared.distill.losses import acceptance, forward_kl, greedy_agreement, total_variation
from shared.distill.options import DistillOptions

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_WARMUP = 0.03
_LAST_RATE = 0.05
_MEASURES = (acceptance, greedy_agreement, forward_kl)


@dataclass(frozen=True, slots=True)
class Quality:
    """On texts that were never trained on: `acceptance` at temperature 1, `greedy` at 0, mean `loss` in nats.

    All three are of first guesses; `by_place` is the acceptance of each place whose guesses are made in another way,
    where all before it are right.
    """

    acceptance: float
    greedy: float
    loss: float
    by_place: list[float]


def rate_at(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then a cosine down to a twentieth."""
    rise = max(1, round(_WARMUP * num_steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, num_steps - rise)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Trainer(Generic[BatchT]):
    """Owns the student's weights and Adam's averages while they change."""

    def __init__(self, student: nn.Module, course: Course[BatchT], options: DistillOptions, num_steps: int) -> None:
        self.student = student
        self._course = course
        self._trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.step = 0
        self.num_steps = num_steps
        self._options = options
        self.optimizer = torch.optim.Adam(self._trained, options.learning_rate, _BETAS, fused=True)

    def learn(self, batch: BatchT, *, varied: bool = False) -> float:
        """One step; the mean loss. `varied` compares by total variation instead of forward KL."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._options.learning_rate * rate_at(self.step, self.num_steps)
        measure = total_variation if varied else forward_kl
        lessons = self._course.lessons(batch)
        loss = torch.stack([lesson.weight * measure(lesson.logits, lesson.expected).mean() for lesson in lessons]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def test(self) -> Quality:
        """Measure on the course's held-out texts."""
        places: dict[int, list[Tensor]] = {}
        for batch in self._course.held_out():
            for place, lesson in enumerate(self._course.lessons(batch)):
                measures = [measure(lesson.logits, lesson.expected) for measure in _MEASURES]
                places.setdefault(place, []).append(torch.stack(measures))
        means = [torch.cat(parts, 1).double().mean(1).tolist() for parts in places.values()]
        accepted, greedy, loss = means[0]
        return Quality(accepted, greedy, loss, [mean[0] for mean in means])
