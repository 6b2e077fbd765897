"""How much of each guess to compute: what makes tokens come fastest, by estimated chances and costs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from shared.engine.step_costs import StepCosts

_WORTHWHILE = 1.08
"""Expected gain below which a step goes without guesses: choosing by noisy estimates picks what was overestimated."""

_LEAST_GAIN = 0.02
"""Places that add less are not weighed."""

_LONGEST_STEP = 2.5
"""Times a step without guesses: more tokens a second are not worth it that streams stand still and come in gulps."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Estimated chances of a draft's tokens one after the other, each given those before."""

    chances: Sequence_[float]

    def gains(self) -> list[float]:
        """Expected tokens that each place adds: the chance that all up to it are right."""
        gains, reach = [], 1.0
        for chance in self.chances:
            reach *= chance
            gains.append(reach)
        return gains


def choose_lengths(chains: Sequence_[Chain], num_tokens: int, cost: Callable[[list[int]], float]) -> list[int]:
    """How much of each chain to compute, so that expected tokens per second are most.

    `num_tokens` come of the step anyway; `cost` gives its seconds from the chosen lengths. Places are taken in order
    of what they add: within a chain that falls, so a place never comes before the one it depends on.
    """
    places = [(gain, -place, index) for index, chain in enumerate(chains) for place, gain in enumerate(chain.gains())]
    lengths = [0] * len(chains)
    best, best_rate, expected = list(lengths), _WORTHWHILE * num_tokens / cost(lengths), float(num_tokens)
    for gain, _, index in sorted(places, reverse=True):
        if gain < _LEAST_GAIN:
            break
        lengths[index] += 1
        expected += gain
        rate = expected / cost(lengths)
        if rate > best_rate:
            best, best_rate = list(lengths), rate
    return best


@dataclass(frozen=True, slots=True)
class PlainStep:
    """A step as planned, without guesses: `num_rows` rows of at most `max_rows`, one token for each sequence."""

    costs: StepCosts
    num_rows: int
    num_sequences: int
    max_rows: int

    def lengths(self, chains: Sequence_[Chain], guessing: Callable[[list[int]], float] | None = None) -> list[int]:
        """How much of each chain to compute in this step; `guessing` gives the seconds that making it takes."""
        longest = _LONGEST_STEP * self.costs.whole(self.num_rows)

        def cost(lengths: list[int]) -> float:
            num_rows = self.num_rows + sum(lengths)
            seconds = self.costs.whole(num_rows) if num_rows <= self.max_rows else float("inf")
            if seconds > longest:
                return float("inf")
            return seconds + guessing(lengths) if guessing else seconds

        return choose_lengths(chains, self.num_sequences, cost)
