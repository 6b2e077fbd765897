"""The proposers of a worker: who is asked for a guess, whose guess is taken, and how far each of them is believed."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace

import structlog

from shared.engine.acceptance import Acceptance
from shared.engine.draft_lengths import Chain, PlainStep
from shared.engine.proposer import NO_DRAFT, Ask, Draft, Proposer
from shared.engine.sequence import Sequence

log = structlog.get_logger()

_TRY_EVERY = 24
_TRY_SEQUENCES = 4
_TRY_TOKENS = 2
"""Steps after which a proposer that is not worth its time is tried, and how much is asked of it then."""


@dataclass(slots=True)
class PositionCounts:
    """Guesses computed and accepted at each place of a draft, from its first token on."""

    drafted: list[int]
    accepted: list[int]


@dataclass(slots=True)
class Member:
    """A proposer and what is known of it. What repeats itself greedily need not do so when sampled, and is not
    believed to."""

    proposer: Proposer
    counts: PositionCounts
    greedy: Acceptance = field(default_factory=Acceptance)
    sampled: Acceptance = field(default_factory=Acceptance)
    num_untried: int = _TRY_EVERY - 1
    has_failed: bool = False

    def acceptance(self, sequence: Sequence) -> Acceptance:
        """What is known of guesses for sequences like this one."""
        return self.sampled if sequence.params.temperature else self.greedy

    def typical(self, sequence: Sequence) -> float:
        """The chance of a guess that was not made yet."""
        return self.acceptance(sequence).typical(sequence)

    def guesses_for(self, sequence: Sequence) -> bool:
        """Whether it may be asked: the request allows it, and it has not failed."""
        allowed = sequence.params.proposers
        return not self.has_failed and (allowed is None or self.proposer.name in allowed)


@dataclass(slots=True)
class Guess:
    """A sequence's draft in this step, and who made it; `num_computed` of it went into the step."""

    sequence: Sequence
    draft: Draft
    member: Member
    num_computed: int = 0

    @property
    def first_chance(self) -> float:
        """That the draft's first token is right."""
        return self.member.acceptance(self.sequence).chance(self.sequence, self.draft.confidences[0])

    @property
    def chain(self) -> Chain:
        acceptance = self.member.acceptance(self.sequence)
        return Chain([acceptance.chance(self.sequence, confidence) for confidence in self.draft.confidences])


class ProposerStack:
    """Asks proposers in order, and learns from what was sampled. Lives on the engine thread.

    A sequence gets the first draft that comes, or a later one that is likelier right. A proposer that raises is not
    asked again: tokens do not need it.
    """

    def __init__(self, proposers: Sequence_[Proposer], max_draft_tokens: int) -> None:
        self._members = [
            Member(proposer, PositionCounts([0] * max_draft_tokens, [0] * max_draft_tokens)) for proposer in proposers
        ]
        self.priced_s = 0.0
        """How long proposers guessed in this step that say what their guesses cost."""

    @property
    def counts(self) -> dict[str, PositionCounts]:
        """By proposer."""
        return {member.proposer.name: member.counts for member in self._members}

    def begin_step(self) -> None:
        """Nobody has guessed in this step yet."""
        self.priced_s = 0.0

    def guess(self, asks: Sequence_[Ask], step: PlainStep) -> dict[Sequence, Guess]:
        """Guesses for those sequences that somebody has one for, whether it is worth its rows or not."""
        guesses: dict[Sequence, Guess] = {}
        for member in self._members:
            chosen = _affordable(member, [ask for ask in asks if _is_open(member, ask, guesses)], step)
            if not chosen:
                continue
            for ask, draft in zip(chosen, self._drafts(member, chosen), strict=True):
                if draft.tokens:
                    guesses[ask.sequence] = Guess(ask.sequence, draft, member)
        return guesses

    def learn(self, guess: Guess, sampled: Sequence_[int]) -> None:
        """Compare a guess with the tokens that were sampled in its place, also where it was not computed."""
        acceptance, counts = guess.member.acceptance(guess.sequence), guess.member.counts
        pairs = zip(guess.draft.tokens, guess.draft.confidences, sampled, strict=False)
        for place, (token, confidence, actual) in enumerate(pairs):
            is_right = token == actual
            acceptance.observe(guess.sequence, confidence, is_right=is_right)
            if place < guess.num_computed:
                counts.accepted[place] += is_right
            if not is_right:
                break
        for place in range(guess.num_computed):
            counts.drafted[place] += 1

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. May be repeated."""
        for member in self._members:
            member.acceptance(sequence).forget(sequence)
            if member.has_failed:
                continue
            try:
                member.proposer.forget(sequence)
            except Exception:
                _retire(member)

    def _drafts(self, member: Member, asks: list[Ask]) -> list[Draft]:
        began = time.perf_counter()
        is_priced = member.proposer.seconds(len(asks)) > 0
        try:
            drafts = member.proposer.propose(asks)
        except Exception:
            _retire(member)
            return [NO_DRAFT] * len(asks)
        if is_priced:
            self.priced_s += time.perf_counter() - began
        return drafts


def _retire(member: Member) -> None:
    """To be called where it has raised."""
    member.has_failed = True
    log.exception("proposer_failed", proposer=member.proposer.name, hint="it guesses no more until a restart")


def _is_open(member: Member, ask: Ask, guesses: dict[Sequence, Guess]) -> bool:
    if not member.guesses_for(ask.sequence):
        return False
    guess = guesses.get(ask.sequence)
    return guess is None or guess.first_chance < member.typical(ask.sequence)


def _affordable(member: Member, asks: list[Ask], step: PlainStep) -> list[Ask]:
    """What to ask of a proposer whose guesses cost time: only as many as are expected to pay for that too."""
    seconds = member.proposer.seconds
    if not asks or not seconds(len(asks)):
        return asks
    chains = [Chain([member.typical(ask.sequence)] * ask.max_tokens) for ask in asks]
    lengths = step.lengths(chains, seconds)
    if any(lengths):
        member.num_untried = 0
        return [replace(ask, max_tokens=length) for ask, length in zip(asks, lengths, strict=True) if length]
    return _tried(member, asks)


def _tried(member: Member, asks: list[Ask]) -> list[Ask]:
    """Now and then what does not pay is asked for all the same: else nobody would notice that it would pay now."""
    member.num_untried += 1
    if member.num_untried < _TRY_EVERY:
        return []
    member.num_untried = 0
    return [replace(ask, max_tokens=min(_TRY_TOKENS, ask.max_tokens)) for ask in asks[:_TRY_SEQUENCES]]
