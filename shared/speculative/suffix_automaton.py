"""A suffix automaton over token ids: where the longest suffix of what was read occurred before.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). It grows by one token in amortised
constant time; a state stands for the substrings that end at the same places, and remembers one such place.

Transitions are numbers in one dictionary and three lists, not a dictionary a state: thousands of small objects would
have the garbage collector look at everything a worker has loaded, again and again.
"""

from __future__ import annotations

ROOT = 0
_NONE = -1
_SHIFT = 32
"""A transition's key: its state above these bits, its token (and one, so that −1 is a token) below."""


class SuffixAutomaton:
    """Of a growing text of tokens ≥ −1. States are numbers; the text is kept, because matches are continued from it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._target: dict[int, int] = {}
        self._edge_token: list[int] = []
        self._edge_before: list[int] = []  # the state's edge made before this one
        self._last_edge = [_NONE]
        self._link = [_NONE]
        self._length = [0]
        self._end = [_NONE]  # a place in `tokens` where the state's substrings end
        self._last = ROOT

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        """Read one more token."""
        self.tokens.append(token)
        target, links, lengths = self._target, self._link, self._length
        state = self._add(lengths[self._last] + 1, ROOT, len(self.tokens) - 1)
        before, key = self._last, token + 1
        while before != _NONE and (before << _SHIFT | key) not in target:
            self._connect(before, token, state)
            before = links[before]
        if before != _NONE:
            found = target[before << _SHIFT | key]
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
        target, key = self._target, token + 1
        while state != ROOT and (state << _SHIFT | key) not in target:
            state = self._link[state]
            length = min(length, self._length[state])  # the text may have grown since, and states been split
        following = target.get(state << _SHIFT | key)
        return (ROOT, 0) if following is None else (following, length + 1)

    def end_of(self, state: int) -> int:
        """A place where the substrings of a state end."""
        return self._end[state]

    def continuation(self, end: int, count: int) -> list[int]:
        """Up to `count` tokens after a place. At the end of the text it goes on with itself, as a repetition would."""
        following = self.tokens[end + 1 : end + 1 + count]
        while following and len(following) < count:
            following += following[: count - len(following)]
        return following

    def _add(self, length: int, link: int, end: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._last_edge.append(_NONE)
        return len(self._length) - 1

    def _connect(self, state: int, token: int, target: int) -> None:
        self._target[state << _SHIFT | token + 1] = target
        self._edge_token.append(token)
        self._edge_before.append(self._last_edge[state])
        self._last_edge[state] = len(self._edge_token) - 1

    def _split(self, before: int, token: int, found: int) -> int:
        """A state for the shorter ones of `found`'s substrings, which now end at one place more."""
        clone = self._add(self._length[before] + 1, self._link[found], self._end[found])
        edge = self._last_edge[found]
        while edge != _NONE:
            other = self._edge_token[edge]
            self._connect(clone, other, self._target[found << _SHIFT | other + 1])
            edge = self._edge_before[edge]
        key = token + 1
        while before != _NONE and self._target.get(before << _SHIFT | key) == found:
            self._target[before << _SHIFT | key] = clone
            before = self._link[before]
        self._link[found] = clone
        return clone
