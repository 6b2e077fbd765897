"""How many guesses each sequence of a step carries: as many as make the step's tokens come fastest, often none.

A guess that is right saves a step, a wrong one costs a row; both are estimated, from what was sampled so far and from
what steps of this worker cost. Guesses are compared with what was sampled even where they were not computed, so that
what is not worth its rows now goes on being judged.

Four things decide, each in its file: whether a proposer's guesses have paid so far (`account`), how often to look for
some (`patience`), who guesses and what that is worth (`proposer_stack`), and how much of it to compute
(`draft_lengths`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from shared.engine.account import Account
from shared.engine.draft_lengths import PlainStep
from shared.engine.noise import F32
from shared.engine.patience import Patience
from shared.engine.proposer import Ask, Proposer
from shared.engine.proposer_stack import Guess, PositionCounts, ProposerStack
from shared.engine.scheduler import Scheduled, Scheduler
from shared.engine.sequence import Sequence
from shared.engine.step_costs import OUTLIER, StepCosts

_OBSERVED_STEPS = 4
"""Where nobody has a guess, one step of so many teaches what steps cost: learning takes time, too."""

_REMEMBERED_STEPS = 64
"""What steps of some size cost is worked out again after so many steps."""


@dataclass(slots=True)
class Speculation:
    """Adds drafts to plans and learns from what was sampled. Lives on the engine thread."""

    proposers: Sequence_[Proposer]
    tables: dict[int, StepCosts]
    """By the number of cores a step has; empty until they are measured, and till then nothing is guessed."""

    max_rows: int
    max_draft_tokens: int = 8
    patience: Patience = field(default_factory=Patience)
    new_account: Callable[[], Account] = Account
    """Each proposer has one."""

    _stack: ProposerStack = field(init=False)
    _guesses: dict[Sequence, Guess] = field(default_factory=dict)
    _hidden: dict[Sequence, F32] = field(default_factory=dict)
    _plain_steps: dict[tuple[int, int], PlainStep] = field(default_factory=dict)
    _step: PlainStep | None = None
    """The one that guesses were looked for."""

    _num_sequences: int = 0
    """Of the last step in which guesses were looked for, and of those that were found how many began right."""

    _num_right: int = 0
    _num_cores: int = 0
    _num_steps: int = 0

    def __post_init__(self) -> None:
        self._stack = ProposerStack(self.proposers, self.max_draft_tokens, self.new_account)

    @property
    def counts(self) -> dict[str, PositionCounts]:
        """Guesses computed and accepted, by proposer."""
        return self._stack.counts

    def totals(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Guesses computed and accepted at each place, of all proposers."""
        counts = self.counts.values()
        drafted = tuple([sum(place) for place in zip(*(count.drafted for count in counts), strict=True)])
        return drafted, tuple([sum(place) for place in zip(*(count.accepted for count in counts), strict=True)])

    def extend(self, plan: list[Scheduled], scheduler: Scheduler, num_cores: int) -> list[Scheduled]:
        """The plan with the drafts that are worth their rows, in a step on so many cores."""
        self._judge_last_look()
        self._num_cores = max((cores for cores in self.tables if cores <= num_cores), default=0)
        self._num_steps += 1
        if self._num_steps % _REMEMBERED_STEPS == 0:
            self._plain_steps.clear()
        if not self._stack.begin_step() or not self._num_cores or not _only_decodes(plan) or self.patience.rests():
            return plan
        began = time.perf_counter()
        self._num_sequences = len(plan)
        step = self._plain_step(plan)
        if not step.can_pay or not (asks := self._asks(plan)):
            return plan
        self._step = step
        extended = self._with_guesses(plan, asks, step, scheduler)
        self._stack.looked(time.perf_counter() - began)
        return extended

    def observe_beside(self, seconds: float) -> None:
        """So much passed between two steps' times in the model; what proposers name as their own time is not in it."""
        for costs in self.tables.values():
            costs.observe_beside(max(0.0, seconds - self._stack.priced_s))

    def observe_step(self, plan: Sequence_[Scheduled], seconds: float) -> None:
        """A planned step took so long in the model; prompts' rows cost less than sampled ones and teach nothing."""
        self._stack.passed(seconds, len(plan))
        if not self._num_cores or (not self._guesses and self._num_steps % _OBSERVED_STEPS) or not _only_decodes(plan):
            return
        num_rows, costs = sum(item.num_rows for item in plan), self.tables[self._num_cores]
        if self._step is not None and num_rows > self._step.num_rows:
            took = min(seconds, OUTLIER * costs.larger_step(num_rows, self._step.num_rows))
            self._stack.computed(self._guesses.values(), took - costs.step(self._step.num_rows))
        costs.observe_step(num_rows, seconds)

    def learn(self, item: Scheduled, sampled: Sequence_[int], hidden: F32) -> None:
        """Compare a sequence's guess with the tokens that were sampled in its place, the last of them from `hidden`."""
        self._hidden[item.sequence] = hidden
        guess = self._guesses.get(item.sequence)
        if guess is None or self._step is None:
            return
        self._num_right += guess.draft.tokens[0] == sampled[0]
        self._stack.learn(guess, sampled, self._step.token_seconds)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. May be repeated."""
        self._hidden.pop(sequence, None)
        self._stack.forget(sequence)

    def _judge_last_look(self) -> None:
        if self._num_sequences:
            num_computed = sum(guess.num_computed for guess in self._guesses.values())
            self.patience.looked(self._num_sequences, num_computed, self._num_right)
        self._guesses, self._step = {}, None
        self._num_sequences = self._num_right = 0

    def _plain_step(self, plan: list[Scheduled]) -> PlainStep:
        key = self._num_cores, len(plan)
        if key not in self._plain_steps:
            self._plain_steps[key] = PlainStep(self.tables[self._num_cores], len(plan), len(plan), self.max_rows)
        return self._plain_steps[key]

    def _asks(self, plan: list[Scheduled]) -> list[Ask]:
        """About all sequences that guesses could be of use to."""
        return [
            Ask(item.sequence, wanted, self._hidden.get(item.sequence))
            for item in plan
            if (wanted := self._wanted(item)) > 0
        ]

    def _with_guesses(
        self, plan: list[Scheduled], asks: list[Ask], step: PlainStep, scheduler: Scheduler
    ) -> list[Scheduled]:
        self._guesses = self._stack.guess(asks, step)
        if not self._guesses:
            return plan
        chains = [guess.chain for guess in self._guesses.values()]
        lengths = dict(zip(self._guesses, step.lengths(chains), strict=True))
        return [self._with_draft(item, lengths.get(item.sequence, 0), scheduler) for item in plan]

    def _wanted(self, item: Scheduled) -> int:
        """Guesses that could be of use: none where no single choice is sampled, none beyond the last token."""
        sequence = item.sequence
        if sequence.params.proposers == ():
            return 0
        if sequence.hold or len(sequence.choices) != 1 or sequence.wants_prompt_logprobs:
            return 0
        return min(self.max_draft_tokens, sequence.params.max_tokens - sequence.num_output - 1)

    def _with_draft(self, item: Scheduled, length: int, scheduler: Scheduler) -> Scheduled:
        if not length:
            return item
        guess = self._guesses[item.sequence]
        item = scheduler.with_draft(item, guess.draft.tokens[:length])
        guess.num_computed = len(item.draft)
        return item


def _only_decodes(plan: Sequence_[Scheduled]) -> bool:
    return all(item.num_tokens == 1 for item in plan)
