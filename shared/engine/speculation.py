"""How many guesses each sequence of a step carries: as many as make the step's tokens come fastest, often none.

A guess that is right saves a step, a wrong one costs a row; both are estimated, from what was sampled so far and from
what steps of this worker cost. Guesses are compared with what was sampled even where they were not computed, so that
what is not worth its rows now goes on being judged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace

import structlog

from shared.engine.acceptance import Acceptance
from shared.engine.draft_lengths import Chain, choose_lengths
from shared.engine.noise import F32
from shared.engine.proposer import NO_DRAFT, Ask, Draft, Proposer
from shared.engine.scheduler import Scheduled, Scheduler
from shared.engine.sequence import Sequence
from shared.engine.step_costs import StepCosts

log = structlog.get_logger()

_SUREST = 0.98
"""What is not worth it with such chances is not worth asking for."""

_LONGEST_STEP = 2.5
"""Times a step without guesses: more tokens a second are not worth it that streams stand still and come in gulps."""

_TRY_EVERY = 24
_TRY_SEQUENCES = 4
_TRY_TOKENS = 2
"""Steps after which a proposer that is not worth its time is tried, and how much is asked of it then."""

_LONGEST_REST = 8
"""Steps a sequence is not asked about after guesses of no use: asking takes time, too."""

_VAIN_STEPS = 16
_SEQUENCES_A_PAUSE = 4
"""Where no guess was worth its row for so long, large steps look for guesses less and less often: one in as many as
there are fours of sequences. In a small step a guess missed is dearer than looking.
"""


@dataclass(slots=True)
class PositionCounts:
    """Guesses computed and accepted at each place of a draft, from its first token on."""

    drafted: list[int]
    accepted: list[int]


@dataclass(slots=True)
class Guess:
    """A sequence's draft in this step, and who made it; `num_computed` of it went into the step."""

    draft: Draft = NO_DRAFT
    proposer: int = -1
    num_computed: int = 0


@dataclass(slots=True)
class Rest:
    """A sequence whose guesses were of no use is asked about less and less often."""

    steps: int = 0
    next: int = 1

    def is_over(self) -> bool:
        self.steps -= 1
        return self.steps < 0

    def begin(self) -> None:
        self.steps, self.next = self.next, min(2 * self.next, _LONGEST_REST)


@dataclass(slots=True)
class Speculation:
    """Adds drafts to plans and learns from what was sampled. Lives on the engine thread.

    Proposers are asked in order; a sequence carries the first draft that came, or a later one that is likelier right.
    """

    proposers: Sequence_[Proposer]
    tables: dict[int, StepCosts]
    """By the number of cores a step has; empty until they are measured, and till then nothing is guessed."""

    max_rows: int
    max_draft_tokens: int = 8
    counts: dict[str, PositionCounts] = field(default_factory=dict)
    _acceptance: list[Acceptance] = field(default_factory=list)
    _guesses: dict[Sequence, Guess] = field(default_factory=dict)
    _rests: dict[Sequence, Rest] = field(default_factory=dict)
    _hidden: dict[Sequence, F32] = field(default_factory=dict)
    _payable: dict[tuple[int, int, int], bool] = field(default_factory=dict)
    _unasked: list[int] = field(default_factory=list)
    _num_cores: int = 0
    _guessing_s: float = 0.0
    _num_vain: int = 0
    _failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._acceptance = [Acceptance() for _ in self.proposers]
        self._unasked = [_TRY_EVERY - 1] * len(self.proposers)
        for proposer in self.proposers:
            self.counts[proposer.name] = PositionCounts([0] * self.max_draft_tokens, [0] * self.max_draft_tokens)

    @property
    def costs(self) -> StepCosts:
        """Of the step that is planned."""
        return self.tables[self._num_cores]

    def extend(self, plan: list[Scheduled], scheduler: Scheduler, num_cores: int) -> list[Scheduled]:
        """The plan with the drafts that are worth their rows, in a step on so many cores."""
        self._guesses.clear()
        self._guessing_s = 0.0
        self._num_cores = max((cores for cores in self.tables if cores <= num_cores), default=0)
        if not self._num_cores:
            return plan
        num_rows = sum(item.num_tokens for item in plan)
        if self._pauses(len(plan)) or not self._can_pay(num_rows, len(plan)):
            return plan
        asks = [self._ask(item, wanted) for item in plan if (wanted := self._wanted(item)) > 0]
        self._propose(asks, num_rows, len(plan))
        if not self._guesses:
            return plan
        chains = [self._chain(sequence, guess) for sequence, guess in self._guesses.items()]
        lengths = dict(zip(self._guesses, self._lengths(chains, num_rows, len(plan)), strict=True))
        if any(lengths.values()):
            self._num_vain = 0
        return [self._with_draft(item, lengths.get(item.sequence, 0), scheduler) for item in plan]

    def totals(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Guesses computed and accepted at each place, of all proposers."""
        counts = self.counts.values()
        drafted = tuple([sum(place) for place in zip(*(count.drafted for count in counts), strict=True)])
        return drafted, tuple([sum(place) for place in zip(*(count.accepted for count in counts), strict=True)])

    def observe_beside(self, seconds: float) -> None:
        """So much passed between two steps' times in the model; what proposers name as their own time is not in it."""
        for costs in self.tables.values():
            costs.observe_beside(max(0.0, seconds - self._guessing_s))

    def observe_step(self, plan: Sequence_[Scheduled], seconds: float) -> None:
        """A planned step took so long in the model; prompts' rows cost less than sampled ones and teach nothing."""
        if self._num_cores and all(item.num_tokens == 1 for item in plan):
            self.costs.observe_step(sum(item.num_rows for item in plan), seconds)

    def learn(self, item: Scheduled, sampled: Sequence_[int], hidden: F32) -> None:
        """Compare a sequence's guess with the tokens that were sampled in its place, the last of them from `hidden`."""
        self._hidden[item.sequence] = hidden
        guess = self._guesses.get(item.sequence)
        if guess is None:
            return
        if guess.num_computed or guess.draft.tokens[0] == sampled[0]:
            self._rests.pop(item.sequence, None)
        else:
            self._rests.setdefault(item.sequence, Rest()).begin()
        acceptance, counts = self._acceptance[guess.proposer], self.counts[self.proposers[guess.proposer].name]
        pairs = zip(guess.draft.tokens, guess.draft.confidences, sampled, strict=False)
        for place, (token, confidence, actual) in enumerate(pairs):
            is_right = token == actual
            acceptance.observe(item.sequence, confidence, is_right=is_right)
            if place < guess.num_computed:
                counts.accepted[place] += is_right
            if not is_right:
                break
        for place in range(guess.num_computed):
            counts.drafted[place] += 1

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. May be repeated."""
        self._rests.pop(sequence, None)
        self._hidden.pop(sequence, None)
        for proposer, acceptance in zip(self.proposers, self._acceptance, strict=True):
            proposer.forget(sequence)
            acceptance.forget(sequence)

    def _pauses(self, num_sequences: int) -> bool:
        """Whether this step goes without a look, because the ones before found nothing."""
        self._num_vain += 1
        every = min(self._num_vain // _VAIN_STEPS, num_sequences // _SEQUENCES_A_PAUSE)
        return every > 1 and self._num_vain % every != 0

    def _wanted(self, item: Scheduled) -> int:
        """Guesses that could be of use: none where no single choice is sampled, none beyond the last token."""
        sequence = item.sequence
        if sequence.params.proposers == ():
            return 0
        if item.num_tokens != 1 or sequence.hold or len(sequence.choices) != 1 or sequence.wants_prompt_logprobs:
            return 0
        rest = self._rests.get(sequence)
        if rest is not None and not rest.is_over():
            return 0
        return min(self.max_draft_tokens, sequence.params.max_tokens - sequence.num_output - 1)

    def _ask(self, item: Scheduled, max_tokens: int) -> Ask:
        return Ask(item.sequence, max_tokens, self._hidden.get(item.sequence))

    def _propose(self, asks: list[Ask], num_rows: int, num_tokens: int) -> None:
        """A guess for each sequence, of the first proposer that has one, or of a later one that is likelier right."""
        for index in range(len(self.proposers)):
            open_asks = [ask for ask in asks if self._is_open(index, ask.sequence)]
            chosen = self._affordable(index, open_asks, num_rows, num_tokens)
            if not chosen:
                continue
            for ask, draft in zip(chosen, self._drafts(index, chosen), strict=True):
                if draft.tokens:
                    self._guesses[ask.sequence] = Guess(draft, index)
        for ask in asks:
            if ask.sequence not in self._guesses:
                self._rests.setdefault(ask.sequence, Rest()).begin()

    def _drafts(self, index: int, asks: list[Ask]) -> list[Draft]:
        """What a proposer guesses. One that raises is not asked again: tokens do not need it."""
        proposer, began = self.proposers[index], time.perf_counter()
        is_timed = proposer.seconds(len(asks)) > 0
        try:
            drafts = proposer.propose(asks)
        except Exception:
            log.exception("proposer_failed", proposer=proposer.name, hint="it guesses no more until a restart")
            self._failed.add(index)
            return [NO_DRAFT] * len(asks)
        if is_timed:
            self._guessing_s += time.perf_counter() - began
        return drafts

    def _is_open(self, index: int, sequence: Sequence) -> bool:
        if index in self._failed:
            return False
        allowed = sequence.params.proposers
        if allowed is not None and self.proposers[index].name not in allowed:
            return False
        guess = self._guesses.get(sequence)
        if guess is None:
            return True
        first = self._acceptance[guess.proposer].chance(sequence, guess.draft.confidences[0])
        return first < self._acceptance[index].typical(sequence)

    def _affordable(self, index: int, asks: list[Ask], num_rows: int, num_tokens: int) -> list[Ask]:
        """What to ask of a proposer whose guesses cost time: only as many as are expected to pay for that too."""
        proposer, acceptance = self.proposers[index], self._acceptance[index]
        if not asks or not proposer.seconds(len(asks)):
            return asks

        def cost(lengths: list[int]) -> float:
            places = range(max(lengths))
            drafting = sum([proposer.seconds(sum([length > place for length in lengths])) for place in places])
            return self.costs.whole(num_rows + sum(lengths)) + drafting

        chains = [Chain([acceptance.typical(ask.sequence)] * ask.max_tokens) for ask in asks]
        lengths = choose_lengths(chains, num_tokens, cost)
        if not any(lengths):
            return self._tried(index, asks)
        self._unasked[index] = 0
        return [replace(ask, max_tokens=length) for ask, length in zip(asks, lengths, strict=True) if length]

    def _tried(self, index: int, asks: list[Ask]) -> list[Ask]:
        """Now and then what does not pay is asked for all the same: else nobody would notice that it would pay now."""
        self._unasked[index] += 1
        if self._unasked[index] < _TRY_EVERY:
            return []
        self._unasked[index] = 0
        return [replace(ask, max_tokens=min(_TRY_TOKENS, ask.max_tokens)) for ask in asks[:_TRY_SEQUENCES]]

    def _chain(self, sequence: Sequence, guess: Guess) -> Chain:
        acceptance = self._acceptance[guess.proposer]
        return Chain([acceptance.chance(sequence, confidence) for confidence in guess.draft.confidences])

    def _lengths(self, chains: list[Chain], num_rows: int, num_tokens: int) -> list[int]:
        spare, longest = self.max_rows - num_rows, _LONGEST_STEP * self.costs.whole(num_rows)

        def cost(lengths: list[int]) -> float:
            extra = sum(lengths)
            seconds = self.costs.whole(num_rows + extra) if extra <= spare else float("inf")
            return seconds if seconds <= longest else float("inf")

        return choose_lengths(chains, num_tokens, cost)

    def _can_pay(self, num_rows: int, num_tokens: int) -> bool:
        """Whether the surest guesses of any length would: else nobody is asked."""
        key = self._num_cores, num_rows, num_tokens
        if key not in self._payable:
            if len(self._payable) > 4096:
                self._payable.clear()
            chains = [Chain([_SUREST] * self.max_draft_tokens)] * num_tokens
            self._payable[key] = any(self._lengths(chains, num_rows, num_tokens))
        return self._payable[key]

    def _with_draft(self, item: Scheduled, length: int, scheduler: Scheduler) -> Scheduled:
        if not length:
            return item
        guess = self._guesses[item.sequence]
        item = scheduler.with_draft(item, guess.draft.tokens[:length])
        guess.num_computed = len(item.draft)
        return item
