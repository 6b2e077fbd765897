"""What one client has been given, and whether a journal entry continues it.

No I/O: `stream.py` feeds it from pub/sub and from the journal, the protocol model feeds it from a
simulated, lossy one. Tokens given to a client cannot be taken back, so an entry counts only where
it continues them by length and chain hash; anything doubtful is settled by the journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

from shared.errors import ProtocolError
from shared.protocol.journal import EMPTY_HASH, ChoiceState, Divergence, Gap, chain, fold
from shared.protocol.messages import OUTCOME_FINISHED, End, JournalEntry, Marker, TokenLogprob, Tokens


class Verdict(Enum):
    """What to do after an entry or a journal."""

    TAKEN = "taken"
    REPLAY = "replay"
    CONFLICT = "conflict"


class Delivery:
    """Tokens and the one End of a request, in the order the client gets them.

    `out` is filled here and emptied by the reader. `emax` is the highest epoch seen.
    """

    def __init__(self, num_choices: int) -> None:
        self.choices = [ChoiceState() for _ in range(num_choices)]
        self.out: deque[tuple[str, Tokens | End]] = deque()
        self.end: End | None = None
        self.emax = 0
        self.last_id = ""

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

        The terminal entry counts at once only if every choice is finished, since then nothing can
        be missing before it; otherwise the journal has to show it.
        """
        if self.end is not None:
            return Verdict.TAKEN
        self.emax = max(self.emax, entry.epoch)
        event = entry.event
        if isinstance(event, Marker):
            return Verdict.TAKEN
        if isinstance(event, End):
            if not (self.is_complete and event.outcome == OUTCOME_FINISHED):
                return Verdict.REPLAY
            self._finish(entry.id, event)
            return Verdict.TAKEN
        if event.choice >= len(self.choices):
            return Verdict.REPLAY
        return self._extend(entry.id, event)

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
        for index, theirs in enumerate(state.choices):
            self._catch_up(index, theirs, f"{state.epoch}-{state.ev}", state.prompt_logprobs)
        if state.end is not None:
            if state.end.outcome == OUTCOME_FINISHED and not self.is_complete:
                return Verdict.CONFLICT
            self._finish(f"{state.epoch}-{state.ev}", state.end)
        return Verdict.TAKEN

    def close(self, end: End) -> None:
        """End it here, where Redis cannot tell how it ended."""
        if self.end is None:
            self._finish(self.last_id, end)

    def _extend(self, entry_id: str, event: Tokens) -> Verdict:
        choice = self.choices[event.choice]
        if not event.tokens and event.finish is not None and event.base < len(choice.tokens):
            return self._cut(entry_id, event, choice)
        try:
            new = choice.accept(event)
        except (Gap, Divergence):
            return Verdict.REPLAY
        if new is not None:
            self._put(entry_id, new)
        return Verdict.TAKEN

    def _cut(self, entry_id: str, event: Tokens, choice: ChoiceState) -> Verdict:
        """A stop string ended this choice below what was delivered: finished, nothing is taken back."""
        if choice.finish is None:
            choice.finish = event.finish
            n = len(choice.tokens)
            self._put(entry_id, Tokens(event.choice, n, choice.h, choice.h, (), finish=event.finish))
        return Verdict.TAKEN

    def _catch_up(
        self, index: int, theirs: ChoiceState, entry_id: str, prompt_logprobs: tuple[TokenLogprob | None, ...]
    ) -> None:
        mine = self.choices[index]
        base = len(mine.tokens)
        new = tuple(theirs.tokens[base:])
        if mine.finish is not None or not (new or theirs.finish is not None):
            return
        logprobs = tuple(theirs.logprobs[i] for i in range(base, base + len(new)) if i in theirs.logprobs)
        event = Tokens(
            choice=index,
            base=base,
            h_base=mine.h,
            h=chain(mine.h, new),
            tokens=new,
            logprobs=logprobs if len(logprobs) == len(new) else (),
            finish=theirs.finish,
            prompt_logprobs=prompt_logprobs if index == 0 and mine.h == EMPTY_HASH else (),
        )
        mine.accept(event)
        self._put(entry_id, event)

    def _finish(self, entry_id: str, end: End) -> None:
        self.end = end
        self._put(entry_id, end)

    def _put(self, entry_id: str, event: Tokens | End) -> None:
        self.last_id = entry_id
        self.out.append((entry_id, event))
