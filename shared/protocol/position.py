"""How far a reader has come in a request's journal; as text it is the id of a server-sent event.

The position `<epoch>-<event>` means: every journal entry up to this one was delivered. A marker may bring tokens of
several choices, which are delivered one choice at a time: `<epoch>-0.<choice>` means this marker up to this choice.
Positions come back from clients, so parsing is strict and bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from shared.errors import ProtocolError
from shared.protocol.journal import ChoiceState, JournalState
from shared.protocol.messages import JournalEntry, Marker
from shared.protocol.sampling import MAX_CHOICES

WHOLE = MAX_CHOICES
"""The choice of a position that is past all choices of its entry."""
MAX_NUMBER = (1 << 53) - 1

_TEXT = re.compile(r"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})(?:\.(0|[1-9][0-9]?))?")


class Position(NamedTuple):
    """A place in the journal, ordered as the journal is. `Position()` is before everything.

    A tuple because one is made and compared for every token.
    """

    epoch: int = 0
    ev: int = 0
    choice: int = WHOLE

    @classmethod
    def of(cls, entry: JournalEntry) -> Position:
        """Past the whole of an entry."""
        return cls(entry.epoch, entry.ev)

    @classmethod
    def parse(cls, text: str) -> Position:
        """The inverse of `str`. Raises ProtocolError for anything else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ProtocolError("not a position of the form <epoch>-<event>")
        epoch, ev = int(match[1]), int(match[2])
        choice = WHOLE if match[3] is None else int(match[3])
        is_marker_part = match[3] is None or (ev == 0 and choice < WHOLE)
        if max(epoch, ev) > MAX_NUMBER or not is_marker_part:
            raise ProtocolError("a position's number is out of range")
        return cls(epoch, ev, choice)

    def __str__(self) -> str:
        return f"{self.epoch}-{self.ev}" if self.choice == WHOLE else f"{self.epoch}-{self.ev}.{self.choice}"

    def follows(self, other: Position) -> bool:
        """Whether this entry is the direct successor of that one."""
        return (self.epoch, self.ev) == (other.epoch, other.ev + 1)


START = Position()


class Standing(Enum):
    """What a journal says of a position somebody claims to have come to."""

    KNOWN = "known"
    AHEAD = "ahead"
    LOST = "lost"


def standing(position: Position, entries: Sequence[JournalEntry], num_choices: int) -> Standing:
    """Whether a reader at `position` can go on with this journal.

    AHEAD: the journal has not come so far. LOST: it no longer has this entry, or what the reader was given by then is
    not what the request holds now; both come from Redis losing writes. Raises ProtocolError for a journal that does
    not fold.
    """
    if position == START:
        return Standing.KNOWN
    if not entries:
        return Standing.LOST
    if position > Position.of(entries[-1]):
        return Standing.AHEAD
    found = _states_at(position, entries, num_choices)
    if found is None:
        return Standing.LOST
    held, final = found
    agree = all(_continues(mine, theirs) for mine, theirs in zip(held, final, strict=True))
    return Standing.KNOWN if agree else Standing.LOST


def _states_at(
    position: Position, entries: Sequence[JournalEntry], num_choices: int
) -> tuple[list[list[int]], list[ChoiceState]] | None:
    """Tokens of each choice at `position`, and the choices as they are now; None when no entry is there."""
    state = JournalState.empty(num_choices)
    held: list[list[int]] | None = None
    for entry in entries:
        is_here = (entry.epoch, entry.ev) == (position.epoch, position.ev)
        before = [list(choice.tokens) for choice in state.choices] if is_here else []
        state.accept(entry)
        if is_here:
            if position.choice != WHOLE and not (isinstance(entry.event, Marker) and position.choice < num_choices):
                return None
            held = [
                list(choice.tokens) if index <= position.choice else before[index]
                for index, choice in enumerate(state.choices)
            ]
    return None if held is None else (held, state.choices)


def _continues(held: Sequence[int], now: ChoiceState) -> bool:
    """Whether a choice that had `held` may be continued by what it is now; a stop string may have cut it shorter."""
    common = min(len(held), len(now.tokens))
    return list(held[:common]) == now.tokens[:common] and (len(held) <= len(now.tokens) or now.finish is not None)
