"""What a step of training compares, and the seam between the kinds of students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from shared.distill.losses import Expected

TEST_POSITIONS = 8192
"""So many held-out tokens a test looks at, or a few more."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a student says at n places of a draft, beside what the target expects there."""

    logits: Tensor  # float32 [n, head_size]
    expected: Expected
    weight: float = 1.0


BatchT = TypeVar("BatchT")


class Course(Protocol[BatchT]):
    """A student and the texts it learns from. Batches are a pure function of texts, options and epoch."""

    def epoch(self, number: int) -> Sequence[BatchT]:
        """Batches in which every text to learn from comes once."""
        ...

    def held_out(self) -> Sequence[BatchT]:
        """Batches of texts that are in no epoch."""
        ...

    def lessons(self, batch: BatchT) -> list[Lesson]:
        """On first guesses, then on second ones, and so on as far as the places of a draft differ."""
        ...
