"""How likely a guess is right: learned from what was sampled, by confidence and by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NUM_BINS = 16
_BIN_WEIGHT = 4.0
"""So many observations a bin's first estimate, its confidence, is worth."""

_BIN_MEMORY = 0.995
_REQUEST_WEIGHT = 4.0
_REQUEST_MEMORY = 0.95
_CHOSEN_WEIGHT = 8.0
_CHOSEN_MEMORY = 0.99
"""What is not computed fades the record too: it must recover where nothing is chosen any more."""

_MOST = 0.98
"""Never surer than this: a long run of hits says little of the next text."""


@dataclass(slots=True)
class _Tally:
    """Right guesses against expected ones, older ones counting less."""

    right: float
    expected: float

    def observe(self, right: float, expected: float, memory: float) -> None:
        self.right = self.right * memory + right
        self.expected = self.expected * memory + expected

    def replace_forgotten(self, weight: float, memory: float) -> None:
        """With the first estimate, that all is as expected."""
        self.right += (1 - memory) * weight
        self.expected += (1 - memory) * weight

    @property
    def rate(self) -> float:
        return self.right / self.expected


class Acceptance:
    """One proposer's estimates. A request's own record bends those of its confidences up or down.

    What is computed was chosen because its estimate is high, and some of that is luck. How often it is right against
    what was estimated lowers all estimates for a while, until fewer are chosen.
    """

    def __init__(self) -> None:
        self._bins = [_Tally(_BIN_WEIGHT * (index + 0.5) / _NUM_BINS, _BIN_WEIGHT) for index in range(_NUM_BINS)]
        self._all = _Tally(0.5 * _BIN_WEIGHT, _BIN_WEIGHT)
        self._chosen = _Tally(_CHOSEN_WEIGHT, _CHOSEN_WEIGHT)
        self._requests: dict[object, _Tally] = {}

    def chance(self, request: object, confidence: float) -> float:
        """The estimated probability that a guess of this confidence is what will be sampled."""
        return self.chances(request, (confidence,))[0]

    def chances(self, request: object, confidences: Sequence[float]) -> list[float]:
        """Of the guesses of one draft, each given that those before are right."""
        own = self._requests.get(request)
        factor = self._discount if own is None else self._discount * own.rate
        return [min(_MOST, self._bin(confidence).rate * factor) for confidence in confidences]

    def typical(self, request: object) -> float:
        """The chance of a guess that was not made yet."""
        return min(_MOST, self._estimate(request, self._all) * self._discount)

    def observe(self, request: object, confidence: float, *, is_right: bool, is_chosen: bool = False) -> None:
        """A guess was compared with what was sampled, all guesses before it having been right."""
        estimate = self._estimate(request, self._bin(confidence))
        self._chosen.observe(float(is_right and is_chosen), estimate if is_chosen else 0.0, _CHOSEN_MEMORY)
        self._chosen.replace_forgotten(_CHOSEN_WEIGHT, _CHOSEN_MEMORY)
        expected = max(0.02, self._bin(confidence).rate)
        self._bin(confidence).observe(float(is_right), 1.0, _BIN_MEMORY)
        self._all.observe(float(is_right), 1.0, _BIN_MEMORY)
        tally = self._requests.setdefault(request, _Tally(_REQUEST_WEIGHT, _REQUEST_WEIGHT))
        tally.observe(float(is_right), expected, _REQUEST_MEMORY)
        tally.replace_forgotten(_REQUEST_WEIGHT, _REQUEST_MEMORY)

    def forget(self, request: object) -> None:
        self._requests.pop(request, None)

    @property
    def _discount(self) -> float:
        """How often what was computed is right, against what was estimated of it; good luck raises nothing."""
        return min(1.0, self._chosen.rate)

    def _estimate(self, request: object, tally: _Tally) -> float:
        own = self._requests.get(request)
        return tally.rate * (1.0 if own is None else own.rate)

    def _bin(self, confidence: float) -> _Tally:
        return self._bins[min(_NUM_BINS - 1, int(confidence * _NUM_BINS))]
