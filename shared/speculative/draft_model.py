"""Guesses by a small model that was trained to write as the target does (`slipstream distill`).

It has a paged KV cache of its own, which is rebuilt here from the tokens: nothing of it travels with a hand-off. Its
draws have the target's noise and the request's filters, penalties and bias, so that the two agree as often as can be
(Daliri, Musco and Suresh, arXiv 2408.07978).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_

from shared.engine.batch import build_step
from shared.engine.draws import plan_draws
from shared.engine.proposer import Ask, Draft
from shared.engine.runner import Runner
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.kv.block_manager import BlockManager
from shared.speculative.context import ProposerContext
from shared.speculative.draft_vocabulary import DraftVocabulary
from shared.speculative.drafts import open_layers
from shared.speculative.pace import Pace, ReadingPace

_CATCH_UP = 256
"""Known tokens computed for a sequence in one step at most: a long prompt is read over several."""

_READING = 16
"""Fewer tokens are not called reading: they are what the target sampled since, and take hardly longer than one."""


class _Shadow:
    """A sequence as the draft sees it: the target's tokens and, behind them, its own guesses."""

    def __init__(self, sequence: Sequence) -> None:
        self.own = Sequence(
            sequence.request_id, sequence.params, list(sequence.tokens), sequence.prompt_len, sequence.choices, b""
        )
        self._num_known = len(sequence.tokens)
        self.drafted: list[int] = []
        self.confidences: list[float] = []

    def follow(self, sequence: Sequence) -> None:
        """Take over what was sampled since; where it is what was guessed, it is computed already."""
        own, at = self.own, self._num_known
        while at < min(len(own.tokens), len(sequence.tokens)) and own.tokens[at] == sequence.tokens[at]:
            at += 1
        own.tokens[at:] = sequence.tokens[at:]
        own.num_computed = min(own.num_computed, at, len(own.tokens) - 1)
        self._num_known = len(own.tokens)
        self.drafted, self.confidences = [], []

    def next_step(self) -> Scheduled:
        return Scheduled(self.own, min(self.own.num_pending, _CATCH_UP))

    def take(self, token: int, confidence: float) -> None:
        self.own.tokens.append(token)
        self.drafted.append(token)
        self.confidences.append(confidence)


class DraftModelProposer:
    """Implements `shared.engine.proposer.Proposer`. One ragged step of the draft for each place of the drafts."""

    name = "draft"

    def __init__(self, runner: Runner, vocabulary: DraftVocabulary) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._block_size = runner.cache.layout.block_size
        self._blocks = BlockManager(runner.cache.num_blocks)
        self._shadows: dict[Sequence, _Shadow] = {}
        self._pace = Pace()
        self._reading_pace = ReadingPace()

    def seconds(self, num_sequences: int) -> float:
        """As observed for the nearest number of sequences."""
        return self._pace.seconds(num_sequences)

    def reading_seconds(self, sequence: Sequence) -> float:
        """For tokens that are not in its cache; a few are always new."""
        shadow = self._shadows.get(sequence)
        num_unread = len(sequence.tokens) - (shadow.own.num_computed if shadow else 0)
        return self._reading_pace.seconds(num_unread) if num_unread >= _READING else 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        shadows = [self._shadow(ask.sequence) for ask in asks]
        pairs = [(ask, shadow) for ask, shadow in zip(asks, shadows, strict=True) if self._has_room(shadow.own, ask)]
        self._run([shadow for _, shadow in pairs])
        for place in range(1, max(ask.max_tokens for ask in asks)):
            self._run([shadow for ask, shadow in pairs if place < ask.max_tokens and len(shadow.drafted) == place])
        return [Draft(tuple(shadow.drafted), tuple(shadow.confidences)) for shadow in shadows]

    def forget(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._blocks.release(shadow.own.block_ids)

    def _shadow(self, sequence: Sequence) -> _Shadow:
        shadow = self._shadows.setdefault(sequence, _Shadow(sequence))
        shadow.follow(sequence)
        return shadow

    def _has_room(self, own: Sequence, ask: Ask) -> bool:
        """Blocks for all tokens and the draft; False while none are free."""
        missing = -(-(len(own.tokens) + ask.max_tokens) // self._block_size) - len(own.block_ids)
        if missing > 0:
            if not self._blocks.can_allocate(missing):
                return False
            own.block_ids += self._blocks.allocate(missing)
        return True

    def _run(self, shadows: list[_Shadow]) -> None:
        """One step; those that are computed to their end are given the token that it draws."""
        if not shadows:
            return
        plan = [shadow.next_step() for shadow in shadows]
        self._runner.cache.zero(self._blocks.take_fresh())
        began = time.perf_counter()
        result = self._runner.run(build_step(plan, self._block_size), plan_draws(plan))
        seconds, num_tokens = time.perf_counter() - began, sum(item.num_tokens for item in plan)
        if num_tokens == len(plan):
            self._pace.observe(len(plan), seconds)
        elif num_tokens >= _READING * len(plan):
            self._reading_pace.observe(num_tokens, seconds)
        row = 0
        for shadow, item in zip(shadows, plan, strict=True):
            shadow.own.num_computed += item.num_tokens
            if not shadow.own.num_pending:
                logits, token = result.logits[row], int(result.drawn[row])
                if token < 0:
                    token = self._vocabulary.sample(logits, shadow.own.sample_input(shadow.own.choices[0]))
                shadow.take(token, self._vocabulary.confidence(logits, token))
                row += 1


def make(context: ProposerContext) -> DraftModelProposer | None:
    """On the draft that the worker has; None where that is of another kind."""
    opened = open_layers(context)
    return None if opened is None else DraftModelProposer(*opened)
