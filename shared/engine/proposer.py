"""The seam for what guesses the next tokens of a sequence. Implementations are in `shared.speculative`."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Protocol

from shared.engine.noise import F32
from shared.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence, and how sure their proposer is of each, given that those before are right.

    Confidences are between 0 and 1, of one length with the tokens. They need not be probabilities: what they are worth
    is learned (`shared.engine.acceptance`).
    """

    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()


NO_DRAFT = Draft()


@dataclass(frozen=True, slots=True)
class Ask:
    """At most `max_tokens` (at least 1) are wanted after the last token of `sequence`.

    `hidden` [hidden_size] is the target's row that this last token was drawn from; None where it was sampled elsewhere.
    """

    sequence: Sequence
    max_tokens: int
    hidden: F32 | None = None


class Proposer(Protocol):
    """Guesses tokens on the engine thread. A wrong guess costs time and never changes a token.

    Sequences are known by identity. Their tokens only grow, so state kept for one may be advanced by what is new.
    """

    @property
    def name(self) -> str:
        """As in metrics and in `--speculation`."""
        ...

    def seconds(self, num_sequences: int) -> float:
        """What one more token for each of so many sequences costs, estimated; 0 where guessing is as good as free."""
        ...

    def reading_seconds(self, sequence: Sequence) -> float:
        """What reading the tokens of a sequence that it has not seen takes before it guesses; 0 if next to nothing."""
        ...

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        """One draft for each ask, empty where there is nothing to guess from."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended or is not run here any more: let go of what is kept for it. May be repeated."""
        ...
