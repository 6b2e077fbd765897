"""How likely a guess is right: learned from what was sampled, by confidence and by request."""

from __future__ import annotations

from dataclasses import dataclass

_NUM_BINS = 16
_BIN_WEIGHT = 4.0
"""So many observations a bin's first estimate, its confidence, is worth."""

_BIN_MEMORY = 0.995
_REQUEST_WEIGHT = 4.0
_REQUEST_MEMORY = 0.95
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

    @property
    def rate(self) -> float:
        return self.right / self.expected


class Acceptance:
    """One proposer's estimates. A request's own record bends those of its confidences up or down."""

    def __init__(self) -> None:
        self._bins = [_Tally(_BIN_WEIGHT * (index + 0.5) / _NUM_BINS, _BIN_WEIGHT) for index in range(_NUM_BINS)]
        self._all = _Tally(0.5 * _BIN_WEIGHT, _BIN_WEIGHT)
        self._requests: dict[object, _Tally] = {}

    def chance(self, request: object, confidence: float) -> float:
        """The estimated probability that a guess of this confidence is what will be sampled."""
        tally = self._requests.get(request)
        bend = 1.0 if tally is None else tally.rate
        return min(_MOST, self._bin(confidence).rate * bend)

    def typical(self, request: object) -> float:
        """The chance of a guess that was not made yet."""
        tally = self._requests.get(request)
        bend = 1.0 if tally is None else tally.rate
        return min(_MOST, self._all.rate * bend)

    def observe(self, request: object, confidence: float, *, is_right: bool) -> None:
        """A guess was compared with what was sampled, all guesses before it having been right."""
        expected = max(0.02, self._bin(confidence).rate)
        self._bin(confidence).observe(float(is_right), 1.0, _BIN_MEMORY)
        self._all.observe(float(is_right), 1.0, _BIN_MEMORY)
        tally = self._requests.setdefault(request, _Tally(_REQUEST_WEIGHT, _REQUEST_WEIGHT))
        tally.observe(float(is_right), expected, _REQUEST_MEMORY)
        tally.right += (1 - _REQUEST_MEMORY) * _REQUEST_WEIGHT  # what is forgotten is replaced by the first estimate
        tally.expected += (1 - _REQUEST_MEMORY) * _REQUEST_WEIGHT

    def forget(self, request: object) -> None:
        self._requests.pop(request, None)

    def _bin(self, confidence: float) -> _Tally:
        return self._bins[min(_NUM_BINS - 1, int(confidence * _NUM_BINS))]
