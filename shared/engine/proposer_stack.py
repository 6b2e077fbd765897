"""The proposers of a worker: who is asked for a guess, whose guess is taken, and how far each of them is believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace

import structlog

from shared.engine.acceptance import Acceptance
from shared.engine.account import Account
from shared.engine.draft_lengths import Chain, PlainStep
from shared.engine.proposer import NO_DRAFT, Ask, Draft, Proposer
from shared.engine.sequence import Sequence
from shared.engine.trials import Trials

log = structlog.get_logger()

_TRY_SEQUENCES = 4
_TRY_TOKENS = 2
"""How much is asked of a proposer that is not worth its time, when it is tried."""

_EXPECTED_TOKENS = 32
"""An answer goes on for so many tokens, or for as many as it has, whatever is more: nobody knows when it will end."""


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
    account: Account
    greedy: Acceptance = field(default_factory=Acceptance)
    sampled: Acceptance = field(default_factory=Acceptance)
    trials: Trials = field(default_factory=Trials)
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
        return Chain(self.member.acceptance(self.sequence).chances(self.sequence, self.draft.confidences))


class ProposerStack:
    """Asks proposers in order, and learns from what was sampled. Lives on the engine thread.

    A sequence gets the first draft that comes, or a later one that is likelier right. A proposer that raises is not
    asked again: tokens do not need it.
    """

    def __init__(
        self, proposers: Sequence_[Proposer], max_draft_tokens: int, new_account: Callable[[], Account] = Account
    ) -> None:
        self._members = [
            Member(proposer, PositionCounts([0] * max_draft_tokens, [0] * max_draft_tokens), new_account())
            for proposer in proposers
        ]
        self._asked: list[tuple[Member, float]] = []
        """In this step, and how long deciding about each of them and its guesses took."""

        self.priced_s = 0.0
        """How long proposers guessed in this step that say what their guesses cost."""

    @property
    def counts(self) -> dict[str, PositionCounts]:
        """By proposer."""
        return {member.proposer.name: member.counts for member in self._members}

    def begin_step(self) -> bool:
        """Nobody has guessed in this step yet. Returns whether anybody may: who is in debt may not."""
        self._asked, self.priced_s = [], 0.0
        return any(not member.has_failed and not member.account.is_overdrawn() for member in self._members)

    def passed(self, seconds: float, num_sequences: int) -> None:
        """A step of so many sequences took so long, whether anybody was asked or not."""
        for member in self._members:
            member.account.passed(seconds, num_sequences)
            member.trials.passed(seconds)

    def guess(self, asks: Sequence_[Ask], step: PlainStep) -> dict[Sequence, Guess]:
        """Guesses for those sequences that somebody has one for, whether it is worth its rows or not."""
        guesses: dict[Sequence, Guess] = {}
        for member in self._members:
            if member.account.is_overdrawn():
                continue
            began = time.perf_counter()
            guesses |= self._ask(member, [ask for ask in asks if _is_open(member, ask, guesses)], step)
            self._asked.append((member, time.perf_counter() - began))
        return guesses

    def looked(self, seconds: float) -> None:
        """Looking for guesses took so long in all: who was asked pays its own time and a part of the rest."""
        rest = seconds - sum(own for _, own in self._asked)
        for member, own in self._asked:
            member.account.took(own + rest / len(self._asked))

    def computed(self, guesses: Iterable[Guess], seconds: float) -> None:
        """The step took so long beyond one without these guesses: each pays for its rows."""
        rows = [(guess.member.account, guess.num_computed) for guess in guesses if guess.num_computed]
        num_rows = sum(count for _, count in rows)
        for account, count in rows:
            account.took(seconds * count / num_rows)

    def learn(self, guess: Guess, sampled: Sequence_[int], token_seconds: float) -> None:
        """Compare a guess with the tokens that were sampled in its place, also where it was not computed.

        `token_seconds` is what a token would have taken without it.
        """
        guess.member.account.gave((len(sampled) - 1) * token_seconds)
        acceptance, counts = guess.member.acceptance(guess.sequence), guess.member.counts
        pairs = zip(guess.draft.tokens, guess.draft.confidences, sampled, strict=False)
        for place, (token, confidence, actual) in enumerate(pairs):
            is_right = token == actual
            is_chosen = place < guess.num_computed
            acceptance.observe(guess.sequence, confidence, is_right=is_right, is_chosen=is_chosen)
            if is_chosen:
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

    def _ask(self, member: Member, asks: list[Ask], step: PlainStep) -> dict[Sequence, Guess]:
        """As much as it is worth; where it is not, a little now and then."""
        if chosen := _affordable(member, asks, step):
            member.trials.not_needed()
            drafts, _ = self._drafts(member, chosen)
        elif asks and member.trials.are_due():
            chosen = [_small(ask) for ask in asks[:_TRY_SEQUENCES]]
            drafts, seconds = self._drafts(member, chosen)
            member.trials.made(seconds)
        else:
            return {}
        pairs = zip(chosen, drafts, strict=True)
        return {ask.sequence: Guess(ask.sequence, draft, member) for ask, draft in pairs if draft.tokens}

    def _drafts(self, member: Member, asks: list[Ask]) -> tuple[list[Draft], float]:
        """And the seconds that they took."""
        began = time.perf_counter()
        is_priced = member.proposer.seconds(len(asks)) > 0
        try:
            drafts = member.proposer.propose(asks)
        except Exception:
            _retire(member)
            drafts = [NO_DRAFT] * len(asks)
        seconds = time.perf_counter() - began
        if is_priced:
            self.priced_s += seconds
        return drafts, seconds


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
    asks = [ask for ask in asks if _is_worth_reading(member, ask, step)]
    chains = [Chain([member.typical(ask.sequence)] * ask.max_tokens) for ask in asks]
    lengths = step.lengths(chains, seconds)
    return [replace(ask, max_tokens=length) for ask, length in zip(asks, lengths, strict=True) if length]


def _is_worth_reading(member: Member, ask: Ask, step: PlainStep) -> bool:
    """Whether single guesses, as good as usual, will give back the time to read the sequence first."""
    sequence = ask.sequence
    reading = member.proposer.reading_seconds(sequence)
    if not reading:
        return True
    num_left = min(sequence.params.max_tokens - sequence.num_output, max(_EXPECTED_TOKENS, sequence.num_output))
    saved = member.typical(sequence) * step.seconds / step.num_sequences
    return reading < num_left * (saved - member.proposer.seconds(1) - step.row_seconds)


def _small(ask: Ask) -> Ask:
    return replace(ask, max_tokens=min(_TRY_TOKENS, ask.max_tokens))
