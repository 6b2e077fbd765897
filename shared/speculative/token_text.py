"""A growing text of token ids, and the latest place in it that ends as some text ends.

Tokens are kept as the characters of a string, because searching a string is compiled code: 16,000 tokens take some
10 µs, a request's few hundred one, and nothing has to be filed for it (docs/adr/0018).
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 32
"""Matches are followed no further back: what continues one of this length is as sure as guesses get."""

_OFFSET = 1
"""From a token, which may be −1, to its character; 1,114,111 characters are more than any vocabulary has."""


class TokenText:
    """Tokens ≥ −1, the latest `capacity` of them at most: when they become too many, only the later half stays."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._characters = ""
        self.num_read = 0
        """Of all tokens, whether they are kept or not."""

    def __len__(self) -> int:
        return len(self._characters)

    def extend(self, tokens: Iterable[int]) -> None:
        """Read on."""
        more = "".join([chr(token + _OFFSET) for token in tokens])
        self.num_read += len(more)
        self._characters += more
        if len(self) > self._capacity:
            self._characters = self._characters[-max(1, self._capacity // 2) :]

    def ending(self) -> str:
        """The last `LONGEST` tokens, as `find` takes them."""
        return self._characters[-LONGEST:]

    def repeated(self) -> tuple[int, int]:
        """Length of the longest end of this text that it has had before, and the latest place where that ended.

        The length is at most `LONGEST`; (0, −1) if there is none.
        """
        return _search(self._characters, self.ending(), len(self) - 1)

    def find(self, ending: str) -> tuple[int, int]:
        """The same for the `ending` of another text."""
        return _search(self._characters, ending, len(self))

    def continuation(self, place: int, count: int) -> list[int]:
        """Up to `count` tokens after a place. At the end of the text it goes on with itself, as a repetition would."""
        following = self._characters[place + 1 : place + 1 + count]
        while following and len(following) < count:
            following += following[: count - len(following)]
        return [ord(character) - _OFFSET for character in following]


def _search(text: str, ending: str, until: int) -> tuple[int, int]:
    """Lengths are doubled while they are found, then halved in between: a longer match ends where shorter ones do."""
    length, place, tried, missing = 0, -1, 1, len(ending) + 1
    while length + 1 < missing:
        at = text.rfind(ending[-tried:], 0, until)
        if at < 0:
            missing = tried
        else:
            length, place = tried, at + tried - 1
        doubled = min(2 * tried, len(ending))
        tried = doubled if missing > len(ending) else (length + missing) // 2
    return length, place
