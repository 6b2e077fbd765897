"""How fast this worker prefills and transfers, from what it has seen: decides when to offer a hand-off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WEIGHT = 0.2
_INITIAL_TOKENS_PER_S = 500.0
_TRANSFER_BYTES_PER_S = 1e9


class Pace:
    """Exponential averages; the first guesses only matter for the first prompts."""

    def __init__(self) -> None:
        self._tokens_per_s = _INITIAL_TOKENS_PER_S

    def seconds(self, num_tokens: int) -> float:
        """Estimated time to compute that many prompt tokens."""
        return num_tokens / self._tokens_per_s

    def transfer_seconds(self, num_bytes: int) -> float:
        """Estimated time to move that much KV."""
        return num_bytes / _TRANSFER_BYTES_PER_S

    @contextmanager
    def measure(self) -> Iterator[Callable[[int], None]]:
        """Time a wait for a chunk; call the yielded function with the tokens it computed."""
        started = time.monotonic()

        def measured(num_tokens: int) -> None:
            elapsed = time.monotonic() - started
            if num_tokens > 0 and elapsed > 0:
                self._tokens_per_s += _WEIGHT * (num_tokens / elapsed - self._tokens_per_s)

        yield measured
