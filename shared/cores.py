"""Which of the workers on one machine compute at the moment, so that together they use its cores once.

A board is one word for each worker in memory that `slipstream serve` shares with its children. A worker writes its own
word only, at both ends of a step, and reads the others' as it goes: nobody waits for anybody.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

VARIABLE = "_SLIPSTREAM_CORES"
"""`descriptor:slot`, set by the parent for one child; not a setting."""

MAX_SLOTS = 128
_WORD = 8
_COMPUTING = (1 << 64) - 1
_BETWEEN_STEPS_NS = 5_000_000
"""A worker whose last step ended this recently counts as computing: it is making up its next step."""


class CoreBoard:
    """The shared words. The parent creates it and empties the slot of a child that has died.

    The memory goes with the object, not at `close`: the kernels may hold its address.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.words = np.frombuffer(mmap.mmap(descriptor, MAX_SLOTS * _WORD), dtype=np.uint64)

    @classmethod
    def create(cls) -> CoreBoard:
        """In a file without a name, gone with its last user."""
        with tempfile.TemporaryFile() as file:
            file.truncate(MAX_SLOTS * _WORD)
            return cls(os.dup(file.fileno()))

    @property
    def descriptor(self) -> int:
        """To be inherited by children."""
        return self._descriptor

    def clear(self, slot: int) -> None:
        """The worker of this slot has ended, in the middle of a step or not."""
        self.words[slot] = 0

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class CoreShare:
    """One worker's place on the board: an equal share of `num_cores` among those who compute, lower slots first."""

    board: CoreBoard
    slot: int
    num_cores: int

    @contextmanager
    def step(self) -> Iterator[None]:
        """Held while a step runs."""
        words = self.board.words
        words[self.slot] = _COMPUTING
        try:
            yield
        finally:
            words[self.slot] = time.monotonic_ns()

    def cores(self, now: int) -> range:
        """Cores for a step at `now` (monotonic nanoseconds), at least one, by number among the process's own.

        The kernels count the same way, and run one thread on each: with each on a core of its own the system does not
        move one beside another when a process wakes for a moment.
        """
        words = self.board.words.tolist()
        computing = [slot for slot, word in enumerate(words) if slot != self.slot and word > now - _BETWEEN_STEPS_NS]
        each, rest = divmod(self.num_cores, len(computing) + 1)
        before = sum(slot < self.slot for slot in computing)
        if each == 0:
            return range(before % self.num_cores, before % self.num_cores + 1)
        first = before * each + min(before, rest)
        return range(first, first + each + (before < rest))


def core_share() -> CoreShare | None:
    """This worker's place as its parent gave it; None where no parent did, and it has all its cores."""
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    descriptor, slot = map(int, given.split(":"))
    return CoreShare(CoreBoard(descriptor), slot, len(os.sched_getaffinity(0)))
