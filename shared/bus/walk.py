"""Going through a journal entry by entry, knowing how it ends."""

from __future__ import annotations

from shared.protocol.journal import JournalState
from shared.protocol.messages import JournalEntry, Marker, Tokens
from shared.protocol.position import Position


class Walk:
    """A journal entry by entry, compared with how it ends: `common[c]` tokens of choice c are there to stay."""

    def __init__(self, final: JournalState) -> None:
        self.final = final
        self.running = JournalState.empty(len(final.choices))
        self.common = [0] * len(final.choices)

    def step(self, entry: JournalEntry) -> list[tuple[int, Position]]:
        """Apply an entry; answers the choices it may have changed, each with its position."""
        event = entry.event
        self.running.accept(entry)
        if isinstance(event, Marker):
            for choice, kept in enumerate(event.at):
                self._compare(choice, kept)
            return [(choice, Position(entry.epoch, entry.ev, choice)) for choice in range(len(event.at))]
        if isinstance(event, Tokens):
            self._compare(event.choice, len(self.running.choices[event.choice].tokens))
            return [(event.choice, Position.of(entry))]
        return []

    def is_as_final(self, choice: int) -> bool:
        """Whether this choice has come to its end, as the whole journal has it."""
        now, final = self.running.choices[choice], self.final.choices[choice]
        is_ended = now.finish is not None and final.finish is not None
        return is_ended and self.common[choice] == len(now.tokens) == len(final.tokens)

    def _compare(self, choice: int, kept: int) -> None:
        now, final = self.running.choices[choice].tokens, self.final.choices[choice].tokens
        n = min(self.common[choice], kept)
        while n < min(len(now), len(final)) and now[n] == final[n]:
            n += 1
        self.common[choice] = n
