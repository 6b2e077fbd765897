"""Folding a request's journal into what each choice holds.

The chain hash names a whole token sequence in 64 bits: a writer or reader that knows (length,
hash) knows whether it continues the very same sequence. It guards against mixing attempts, not
against an attacker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shared.errors import ProtocolError
from shared.protocol.messages import End, JournalEntry, Marker, TokenLogprob, Tokens

EMPTY_HASH = ""


class Gap(ProtocolError):
    """An entry starts beyond what is held: something before it was missed; read the journal."""


class Divergence(ProtocolError):
    """An entry contradicts tokens already held: another attempt sampled something else."""


def chain(h: str, tokens: Iterable[int]) -> str:
    """Chain hash after appending `tokens` to a sequence of hash `h` (16 hex digits, "" when empty)."""
    for token in tokens:
        h = hashlib.blake2b(h.encode() + token.to_bytes(4, "little"), digest_size=8).hexdigest()
    return h


@dataclass(slots=True)
class ChoiceState:
    """What one choice holds; `logprobs` by token index. Others read it, only this file writes it."""

    tokens: list[int] = field(default_factory=list)
    h: str = EMPTY_HASH
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    finish: str | None = None

    def hash_at(self, n: int) -> str:
        """Chain hash of the first `n` tokens; O(n) unless n is the length."""
        return self.h if n == len(self.tokens) else chain(EMPTY_HASH, self.tokens[:n])

    def truncate(self, n: int) -> None:
        """Keep `n` tokens; a choice that was finished and loses tokens is open again."""
        if n >= len(self.tokens):
            return
        del self.tokens[n:]
        self.logprobs = {index: value for index, value in self.logprobs.items() if index < n}
        self.h = chain(EMPTY_HASH, self.tokens)
        self.finish = None

    def extend(self, tokens: Sequence[int]) -> None:
        self.h = chain(self.h, tokens)
        self.tokens.extend(tokens)

    def take(self, event: Tokens) -> None:
        """Take tokens that were made to continue this very state: nothing is left to compare."""
        if event.logprobs:
            self.logprobs.update(enumerate(event.logprobs, len(self.tokens)))
        self.tokens.extend(event.tokens)
        self.h = event.h
        self.finish = event.finish

    def accept(self, event: Tokens) -> Tokens | None:
        """Take what is new in `event`; None when it brings nothing.

        An event without tokens that finishes the choice below its length is the gateway's stop
        string: the choice is cut there. Raises Gap and Divergence, and then changes nothing.
        """
        n = len(self.tokens)
        if event.base > n:
            raise Gap(f"an entry starts at token {event.base} but only {n} are known")
        if self.hash_at(event.base) != event.h_base:
            raise Divergence(f"an entry does not continue the {n} tokens held")
        if not event.tokens:
            return self._finish(event)
        held = tuple(self.tokens[event.base : event.base + len(event.tokens)])
        if held != event.tokens[: len(held)]:
            raise Divergence(f"an entry repeats tokens from {event.base} on, but others")
        if chain(event.h_base, event.tokens) != event.h:
            raise Divergence("an entry's hash does not belong to its tokens")
        return self._append(event, len(held))

    def _finish(self, event: Tokens) -> Tokens | None:
        if event.finish is None or self.finish is not None:
            return None
        self.truncate(event.base)
        self.finish = event.finish
        return event

    def _append(self, event: Tokens, skip: int) -> Tokens | None:
        new = event.tokens[skip:]
        finishes = (
            event.finish is not None and self.finish is None and event.base + len(event.tokens) >= len(self.tokens)
        )
        if self.finish is not None or not (new or finishes):
            return None
        fresh = event
        if skip:
            fresh = replace(event, base=len(self.tokens), h_base=self.h, tokens=new, logprobs=event.logprobs[skip:])
        self.logprobs.update(enumerate(fresh.logprobs, len(self.tokens)))
        self.tokens.extend(new)
        self.h = event.h
        if finishes:
            self.finish = event.finish
        return fresh


@dataclass(slots=True)
class JournalState:
    """All choices of a request as its journal tells them, and where the journal stands."""

    choices: list[ChoiceState]
    epoch: int = 0
    ev: int = 0
    end: End | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @classmethod
    def empty(cls, n: int) -> JournalState:
        return cls([ChoiceState() for _ in range(n)])

    @property
    def is_finished(self) -> bool:
        """Every choice is finished, whether or not the terminal entry was seen."""
        return all(choice.finish is not None for choice in self.choices)

    def accept(self, entry: JournalEntry) -> list[Tokens]:
        """Apply the next entry; returns what it adds. Raises Gap, Divergence or ProtocolError."""
        event = entry.event
        new: list[Tokens] = []
        if isinstance(event, Marker):
            self._mark(event)
        elif isinstance(event, Tokens):
            accepted = self._choice(event.choice).accept(event)
            if event.prompt_logprobs and not self.prompt_logprobs:
                self.prompt_logprobs = event.prompt_logprobs
            new = [accepted] if accepted is not None else []
        else:
            self.end = event
        self.epoch, self.ev = entry.epoch, entry.ev
        return new

    def _choice(self, index: int) -> ChoiceState:
        if index >= len(self.choices):
            raise ProtocolError(f"the journal names choice {index} of a request with {len(self.choices)}")
        return self.choices[index]

    def _mark(self, marker: Marker) -> None:
        if len(marker.at) != len(self.choices):
            raise ProtocolError(f"a marker has {len(marker.at)} choices, the request {len(self.choices)}")
        for index, (choice, at) in enumerate(zip(self.choices, marker.at, strict=True)):
            if at > len(choice.tokens):
                raise Gap(f"a marker keeps {at} tokens of choice {index} but only {len(choice.tokens)} are known")
            choice.truncate(at)
            if index < len(marker.tokens) and marker.tokens[index]:
                choice.extend(marker.tokens[index])
                choice.finish = None


def fold(entries: Iterable[JournalEntry], n: int) -> JournalState:
    """State of a request with `n` choices after the whole journal `entries`."""
    state = JournalState.empty(n)
    for entry in entries:
        state.accept(entry)
    return state
