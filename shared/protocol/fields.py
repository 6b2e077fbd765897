"""Reads the fields of one decoded array, each with its type and its bound; anything else raises ProtocolError."""

from __future__ import annotations

import math
from typing import Any, cast

from shared.errors import ProtocolError

MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_NAME = 512
MAX_TEXT = 2048
MAX_INT = (1 << 53) - 1


class Fields:
    """The fields in order; each call takes the next one."""

    __slots__ = ("_at", "_items", "_what")

    def __init__(self, items: object, what: str, size: int) -> None:
        if type(items) is not list or len(items) != size:
            raise ProtocolError(f"{what} is not an array of {size} fields")
        self._items: list[Any] = items
        self._what = what
        self._at = 0

    def take(self) -> Any:
        self._at += 1
        return self._items[self._at - 1]

    def bad(self, expected: str) -> ProtocolError:
        return ProtocolError(f"field {self._at} of {self._what} is not {expected}")

    def integer(self, low: int = 0, high: int = MAX_INT) -> int:
        value = self.take()
        if type(value) is not int or not low <= value <= high:
            raise self.bad(f"an integer of {low}..{high}")
        return value

    def optional_int(self, high: int) -> int | None:
        if self._items[self._at] is None:
            return cast(None, self.take())
        return self.integer(0, high)

    def number(self) -> float:
        value = self.take()
        if type(value) is not float or not math.isfinite(value):
            raise self.bad("a finite number")
        return value

    def optional_words(self, *words: str) -> tuple[str, ...] | None:
        value = self.take()
        if value is None:
            return None
        if type(value) is not list or len(value) > len(words) or any(word not in words for word in value):
            raise self.bad(f"some of {', '.join(words)}")
        return tuple(value)

    def text(self, limit: int = MAX_NAME) -> str:
        value = self.take()
        if type(value) is not str or len(value) > limit:
            raise self.bad(f"text of at most {limit} characters")
        return value

    def word(self, *words: str) -> str:
        value = self.take()
        if value not in words or type(value) is not str:
            raise self.bad(f"one of {', '.join(words)}")
        return value

    def array(self, limit: int) -> list[Any]:
        value = self.take()
        if type(value) is not list or len(value) > limit:
            raise self.bad(f"an array of at most {limit}")
        return value

    def ids(self, limit: int = MAX_TOKENS, high: int = MAX_TOKEN_ID) -> tuple[int, ...]:
        value = self.array(limit)
        if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > high):
            raise self.bad("an array of token ids")
        return tuple(value)

    def counts(self, limit: int) -> tuple[int, ...]:
        values = self.array(limit)
        if any(type(value) is not int or not 0 <= value <= MAX_INT for value in values):
            raise self.bad("an array of counts")
        return tuple(values)

    def hash(self) -> str:
        value = self.take()
        if type(value) is not str or len(value) not in (0, 16):
            raise self.bad("a chain hash")
        return value
