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


def choose_lengths(
    chains: Sequence_[Chain],
    num_tokens: int,
    seconds: Callable[[int], float],
    guessing: Callable[[int], float] = lambda _: 0.0,
) -> list[int]:
    """How much of each chain to compute, so that expected tokens per second are most.

    `num_tokens` come of the step anyway. `seconds` are those of the step with so many guesses in it, `guessing` those
    of making one more guess for each of so many sequences. Places are taken in order of what they add: within a chain
    that falls, so a place never comes before the one it depends on.
    """
    places = [(gain, -place, index) for index, chain in enumerate(chains) for place, gain in enumerate(chain.gains())]
    places = sorted([place for place in places if place[0] >= _LEAST_GAIN], reverse=True)
    at_place = [0] * max((1 - place for _, place, _ in places), default=0)
    best, best_rate, expected, spent = 0, _WORTHWHILE * num_tokens / seconds(0), float(num_tokens), 0.0
    for count, (gain, place, _) in enumerate(places, start=1):
        expected += gain
        spent += guessing(at_place[-place] + 1) - guessing(at_place[-place])
        at_place[-place] += 1
        rate = expected / (seconds(count) + spent)
        if rate > best_rate:
            best, best_rate = count, rate
    lengths = [0] * len(chains)
    for _, _, index in places[:best]:
        lengths[index] += 1
    return lengths


@dataclass(frozen=True, slots=True)
class PlainStep:
    """A step as planned, without guesses: `num_rows` rows of at most `max_rows`, one token for each sequence."""

    costs: StepCosts
    num_rows: int
    num_sequences: int
    max_rows: int

    @property
    def seconds(self) -> float:
        """Estimated, with what comes beside the model."""
        return self.costs.whole(self.num_rows)

    @property
    def row_seconds(self) -> float:
        """What one more row adds."""
        return self.costs.larger_step(self.num_rows + 1, self.num_rows) - self.costs.step(self.num_rows)

    def lengths(self, chains: Sequence_[Chain], guessing: Callable[[int], float] = lambda _: 0.0) -> list[int]:
        """How much of each chain to compute in this step; `guessing` as in `choose_lengths`."""
        longest = _LONGEST_STEP * self.seconds

        def seconds(num_guesses: int) -> float:
            if not num_guesses:
                return self.seconds
            num_rows = self.num_rows + num_guesses
            if num_rows > self.max_rows:
                return float("inf")
            whole = self.costs.larger_step(num_rows, self.num_rows) + self.costs.beside
            return whole if whole <= longest else float("inf")

        return choose_lengths(chains, self.num_sequences, seconds, guessing)
