"""A suffix automaton over token ids: where the longest suffix of what was read occurred before.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). It grows by one token in amortised
constant time; a state stands for the substrings that end at the same places, and remembers one such place.
"""

from __future__ import annotations

ROOT = 0


class SuffixAutomaton:
    """Of a growing text. States are numbers; the text is kept, because matches are continued from it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [-1]  # a place in `tokens` where the state's substrings end
        self._last = ROOT

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        """Read one more token."""
        self.tokens.append(token)
        nexts, links, lengths = self._next, self._link, self._length
        state = self._add(lengths[self._last] + 1, {}, ROOT, len(self.tokens) - 1)
        before = self._last
        while before != -1 and token not in nexts[before]:
            nexts[before][token] = state
            before = links[before]
        if before != -1:
            found = nexts[before][token]
            links[state] = found if lengths[before] + 1 == lengths[found] else self._split(before, token, found)
        self._last = state

    def repeated(self) -> tuple[int, int]:
        """Length of the longest suffix of the text that occurred before, and a place where it ended; (0, -1) if none.

        The next to ask gets the end of the text as it is now: the latest occurrence is the best to continue.
        """
        state = self._link[self._last]
        if state <= ROOT:
            return 0, -1
        end, self._end[state] = self._end[state], len(self.tokens) - 1
        return self._length[state], end

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Read on in another text: the state and length of the longest match that ends with `token`."""
        nexts, links = self._next, self._link
        while state != ROOT and token not in nexts[state]:
            state = links[state]
            length = min(length, self._length[state])  # the text may have grown since, and states been split
        if token in nexts[state]:
            return nexts[state][token], length + 1
        return ROOT, 0

    def end_of(self, state: int) -> int:
        """A place where the substrings of a state end."""
        return self._end[state]

    def continuation(self, end: int, count: int) -> list[int]:
        """Up to `count` tokens after a place. At the end of the text it goes on with itself, as a repetition would."""
        following = self.tokens[end + 1 : end + 1 + count]
        while following and len(following) < count:
            following += following[: count - len(following)]
        return following

    def _add(self, length: int, transitions: dict[int, int], link: int, end: int) -> int:
        self._length.append(length)
        self._next.append(transitions)
        self._link.append(link)
        self._end.append(end)
        return len(self._length) - 1

    def _split(self, before: int, token: int, found: int) -> int:
        """A state for the shorter ones of `found`'s substrings, which now end at one place more."""
        clone = self._add(self._length[before] + 1, dict(self._next[found]), self._link[found], self._end[found])
        while before != -1 and self._next[before].get(token) == found:
            self._next[before][token] = clone
            before = self._link[before]
        self._link[found] = clone
        return clone
