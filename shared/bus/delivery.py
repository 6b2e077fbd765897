"""What the clients of one request have been given, and whether a journal entry continues it.

No I/O: `stream.py` feeds it from pub/sub and from the journal, the protocol model feeds it from a
simulated, lossy one. Tokens given to a client cannot be taken back, so an entry counts only where
it continues them by length and chain hash; anything doubtful is settled by the journal.

Each event is kept under its position: whoever was given everything up to an event was given every
journal entry up to its position, and no more. So another gateway can continue from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from shared.bus.walk import Walk
from shared.errors import ProtocolError
from shared.protocol.journal import EMPTY_HASH, ChoiceState, Divergence, Gap, JournalState, chain, fold
from shared.protocol.messages import OUTCOME_FINISHED, End, JournalEntry, Marker, TokenLogprob, Tokens
from shared.protocol.position import START, Position

MAX_AHEAD = 512
"""Entries kept while an earlier one is missing; the journal has them all."""


class Verdict(Enum):
    """What to do after an entry or a journal."""

    TAKEN = "taken"
    REPLAY = "replay"
    CONFLICT = "conflict"


class Delivery:
    """Tokens and the one End of a request, in the order the clients get them.

    `history` only grows; every reader goes through it at its own pace. `position`: every journal entry up to here is
    in it. `emax` is the highest epoch seen.
    """

    def __init__(self, num_choices: int) -> None:
        self.choices = [ChoiceState() for _ in range(num_choices)]
        self.history: list[tuple[Position, Tokens | End]] = []
        self.end: End | None = None
        self.emax = 0
        self.position = START
        self._ahead: dict[Position, Tokens] = {}

    @property
    def tokens(self) -> list[list[int]]:
        return [choice.tokens for choice in self.choices]

    @property
    def finished(self) -> dict[int, str]:
        """Finish reason of each choice that is finished."""
        return {index: choice.finish for index, choice in enumerate(self.choices) if choice.finish is not None}

    @property
    def is_complete(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    def accept(self, entry: JournalEntry) -> Verdict:
        """Take an entry that came by pub/sub. REPLAY: read the journal, this does not continue what is here.

        With one choice, length and hash say that nothing is missing before it. With more, another choice's tokens may
        be, so only the direct successor of the last entry counts. The terminal entry counts at once only if every
        choice is finished; otherwise the journal has to show it.
        """
        if self.end is not None:
            return Verdict.TAKEN
        self.emax = max(self.emax, entry.epoch)
        event, position = entry.event, Position.of(entry)
        if isinstance(event, Marker):
            return Verdict.TAKEN
        if isinstance(event, End):
            if not (self.is_complete and event.outcome == OUTCOME_FINISHED):
                return Verdict.REPLAY
            self._finish(position, event)
            return Verdict.TAKEN
        if event.choice >= len(self.choices):
            return Verdict.REPLAY
        if position <= self.position and self._holds(event):
            return Verdict.TAKEN
        verdict = self._continue(position, event)
        if verdict is Verdict.REPLAY and self.position < position:
            self._keep_ahead(position, event)
        return verdict

    def follow(self, entries: Sequence[JournalEntry]) -> Verdict:
        """Take what the journal has right after `position`; REPLAY: read it whole."""
        for entry in entries:
            if isinstance(entry.event, Marker):
                if any(entry.event.tokens) or list(entry.event.at) != [len(tokens) for tokens in self.tokens]:
                    return Verdict.REPLAY
                self._advance(Position.of(entry))
                self.emax = max(self.emax, entry.epoch)
            elif self.accept(entry) is Verdict.REPLAY:
                return Verdict.REPLAY
        return Verdict.TAKEN

    def replay(self, entries: Sequence[JournalEntry]) -> Verdict:
        """Take what the whole journal has beyond what was delivered; CONFLICT: it tells another story."""
        if self.end is not None:
            return Verdict.TAKEN
        self.emax = max([self.emax, *(entry.epoch for entry in entries)])
        try:
            state = fold(entries, len(self.choices))
        except ProtocolError:
            return Verdict.CONFLICT
        for mine, theirs in zip(self.choices, state.choices, strict=True):
            common = min(len(mine.tokens), len(theirs.tokens))
            if mine.tokens[:common] != theirs.tokens[:common]:
                return Verdict.CONFLICT
        self._catch_up(entries, state)
        self._take_ahead()
        if state.end is not None:
            if state.end.outcome == OUTCOME_FINISHED and not self.is_complete:
                return Verdict.CONFLICT
            self._finish(Position(state.epoch, state.ev), state.end)
        return Verdict.TAKEN

    def close(self, end: End) -> None:
        """End it here, where Redis cannot tell how it ended."""
        if self.end is None:
            self._finish(self.position, end)

    def _continue(self, position: Position, event: Tokens) -> Verdict:
        """Take tokens if nothing before them is missing."""
        if len(self.choices) > 1 and not position.follows(self.position):
            return Verdict.REPLAY
        return self._extend(position, event)

    def _keep_ahead(self, position: Position, event: Tokens) -> None:
        """Keep what comes while the journal is being read for what is missing before it.

        Without that, a busy request would need its journal again and again: each reading is out of date on arrival.
        """
        if len(self._ahead) >= MAX_AHEAD:
            self._ahead.clear()
        self._ahead[position] = event

    def _take_ahead(self) -> None:
        """Take what came meanwhile as far as it continues what is here now."""
        for position in sorted(self._ahead):
            event = self._ahead.pop(position)
            if position > self.position and self._continue(position, event) is Verdict.REPLAY:
                self._ahead[position] = event
                return

    def _holds(self, event: Tokens) -> bool:
        """Whether an entry brings nothing that is not here already."""
        choice = self.choices[event.choice]
        return event.base + len(event.tokens) <= len(choice.tokens) and (
            event.finish is None or choice.finish is not None
        )

    def _extend(self, position: Position, event: Tokens) -> Verdict:
        choice = self.choices[event.choice]
        if not event.tokens and event.finish is not None and event.base < len(choice.tokens):
            return self._cut(position, event, choice)
        try:
            new = choice.accept(event)
        except (Gap, Divergence):
            return Verdict.REPLAY
        self._advance(position)
        if new is not None:
            self._put(position, new)
        return Verdict.TAKEN

    def _cut(self, position: Position, event: Tokens, choice: ChoiceState) -> Verdict:
        """A stop string ended this choice below what was delivered: finished, nothing is taken back."""
        self._advance(position)
        if choice.finish is None:
            choice.finish = event.finish
            n = len(choice.tokens)
            self._put(position, Tokens(event.choice, n, choice.h, choice.h, (), finish=event.finish))
        return Verdict.TAKEN

    def _catch_up(self, entries: Sequence[JournalEntry], final: JournalState) -> None:
        """Deliver what is new entry by entry, each under its own position; only what the whole journal still holds."""
        if any(self._has_news(*pair) for pair in zip(self.choices, final.choices, strict=True)):
            walk = Walk(final)
            for entry in entries:
                for choice, position in walk.step(entry):
                    self._deliver(choice, walk, position)
        self._advance(Position(final.epoch, final.ev))

    @staticmethod
    def _has_news(mine: ChoiceState, theirs: ChoiceState) -> bool:
        return mine.finish is None and (len(theirs.tokens) > len(mine.tokens) or theirs.finish is not None)

    def _deliver(self, index: int, walk: Walk, position: Position) -> None:
        mine, theirs = self.choices[index], walk.final.choices[index]
        base = len(mine.tokens)
        new = tuple(theirs.tokens[base : walk.common[index]])
        finish = theirs.finish if walk.is_as_final(index) else None
        if mine.finish is not None or not (new or finish is not None):
            return
        held = walk.running.choices[index].logprobs
        logprobs = tuple(held[i] for i in range(base, base + len(new)) if i in held)
        event = Tokens(
            choice=index,
            base=base,
            h_base=mine.h,
            h=chain(mine.h, new),
            tokens=new,
            logprobs=logprobs if len(logprobs) == len(new) else (),
            finish=finish,
            prompt_logprobs=self._prompt_logprobs(index, walk),
        )
        mine.accept(event)
        self._put(position, event)

    def _prompt_logprobs(self, index: int, walk: Walk) -> tuple[TokenLogprob | None, ...]:
        """They come with the first tokens of choice 0."""
        return walk.final.prompt_logprobs if index == 0 and self.choices[0].h == EMPTY_HASH else ()

    def _finish(self, position: Position, end: End) -> None:
        self.end = end
        self._advance(position)
        self._put(position, end)

    def _advance(self, position: Position) -> None:
        self.position = max(self.position, position)

    def _put(self, position: Position, event: Tokens | End) -> None:
        """Positions never go back, though Redis may have lost writes and given their numbers again."""
        last = self.history[-1][0] if self.history else START
        self.history.append((max(last, position), event))
