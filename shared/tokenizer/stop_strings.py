"""Find stop strings in a stream of text without ever showing a part of one.

The cut is defined without regard to how the text arrives: the stop string that is complete first
ends the text (of several complete at the same character the longest), and the text is cut where
that stop string begins. Each stop string is tracked by its own Knuth-Morris-Pratt state, so the
result cannot depend on the chunking and each character costs amortised constant time per stop.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import InvalidRequest


class _Matcher:
    """Knuth-Morris-Pratt over one pattern; `matched` is the longest prefix the text ends in."""

    __slots__ = ("_borders", "matched", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._borders = _borders(pattern)

    def step(self, char: str) -> bool:
        """Take one character; True when the whole pattern has just been completed."""
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.pattern[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders


class StopStrings:
    """Scan one choice's text; `push` once per token so that `num_tokens` says where the stop was complete.

    Once a stop string was found every further push returns nothing and counts nothing, so
    `num_tokens` stays the number of tokens needed to complete the stop (for cancel(upto)).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`include_stop` leaves the stop string itself in the text. Raises InvalidRequest on an empty one."""
        if any(not stop for stop in stops):
            raise InvalidRequest("A stop string is empty; leave it out or give at least one character.", param="stop")
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._include_stop = include_stop
        self._held = ""
        self.stopped: str | None = None
        self.num_tokens = 0

    def push(self, text: str, num_tokens: int = 1) -> tuple[str, str | None]:
        """Take the next text; return what may be shown now, and the stop string once one is complete."""
        if self.stopped is not None:
            return "", self.stopped
        self.num_tokens += num_tokens
        if not self._matchers:
            return text, None
        for index, char in enumerate(text):
            complete = [m.pattern for m in self._matchers if m.step(char)]
            if complete:
                return self._stop(self._held + text[: index + 1], max(complete, key=len)), self.stopped
        self._held += text
        keep = max(matcher.matched for matcher in self._matchers)
        cut = len(self._held) - keep
        emit, self._held = self._held[:cut], self._held[cut:]
        return emit, None

    def flush(self) -> str:
        """The text ended without a stop: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _stop(self, text: str, stop: str) -> str:
        self.stopped = stop
        self._held = ""
        return text if self._include_stop else text[: len(text) - len(stop)]
