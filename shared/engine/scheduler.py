"""Which sequences run this step, and how many tokens each.

A plan maps sequences to token counts: a decode step is 1, a prefill chunk more. Decodes come first, so a long
prompt never delays a running stream by more than a chunk. When blocks run out, the sequence of the lowest priority is
preempted, the newest of them: it loses its blocks, waits at its old place and is computed again; with keyed noise its
tokens do not change. The first in rank is never preempted for others, so something always gets to its end.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from shared.engine.sequence import Sequence, Status
from shared.kv.block_manager import BlockManager


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`prefill_share` caps prefill tokens per step, as a share of the budget, while sequences decode.

    `reserve_blocks` must stay free beside a readmitted or new sequence, so that it is not preempted at once.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    enable_chunked_prefill: bool = True
    prefill_share: float = 1.0
    reserve_blocks: int = 1


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_tokens` known tokens of a sequence, and guesses at those that follow, verified in the same step."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)


class Scheduler:
    """The only owner of the waiting and running lists, both in order of rank: priority, then arrival."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, block_size: int, *, prefix_caching: bool) -> None:
        self._limits = limits
        self._blocks = blocks
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self._arrivals = 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.held: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Run a sequence that has no blocks yet, or queue it: its block list tells which, right away."""
        self._wait(sequence)
        self._admit()

    def start(self, sequence: Sequence) -> None:
        """Run a sequence whose blocks were reserved before."""
        sequence.status = Status.RUNNING
        self._insert(self.running, sequence)

    def hold(self, sequence: Sequence) -> None:
        """A computed prefill sequence leaves the running list but keeps its blocks."""
        self.running.remove(sequence)
        sequence.status = Status.HELD
        self.held.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and let go of its blocks. May be repeated."""
        for members in (self.waiting, self.running, self.held):
            if sequence in members:
                members.remove(sequence)
        sequence.status = Status.FINISHED
        self._drop_blocks(sequence)

    def schedule(self) -> list[Scheduled]:
        """Plan one step; an empty plan means that nothing can run now."""
        plan = self._schedule_decodes()
        budget = self._limits.max_num_batched_tokens - len(plan)
        if plan:
            budget = min(budget, max(self._block_size, int(budget * self._limits.prefill_share)))
        self._admit()
        self._schedule_chunks(plan, budget)
        return plan

    def with_draft(self, item: Scheduled, draft: tuple[int, ...]) -> Scheduled:
        """The item with as much of a draft as there is room for: blocks that are free, never another sequence's."""
        sequence, size = item.sequence, self._block_size
        missing = -(-(len(sequence.tokens) + len(draft)) // size) - len(sequence.block_ids)
        if missing > 0 and not self.waiting and self._blocks.can_allocate(missing + self._limits.reserve_blocks):
            sequence.block_ids += self._blocks.allocate(missing)
        num_slots = len(sequence.block_ids) * size - len(sequence.tokens)
        return replace(item, draft=draft[:num_slots])

    def _schedule_decodes(self) -> list[Scheduled]:
        plan = []
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and sequence.num_pending == 1 and self._grow(sequence):
                plan.append(Scheduled(sequence, 1))
        return plan

    def _schedule_chunks(self, plan: list[Scheduled], budget: int) -> None:
        planned = {id(item.sequence) for item in plan}
        for sequence in self.running:
            if budget > 0 and sequence.num_pending and id(sequence) not in planned and self._has_slots(sequence):
                whole = sequence.num_pending
                count = min(whole, budget) if self._limits.enable_chunked_prefill else whole
                plan.append(Scheduled(sequence, count))
                budget -= count

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._limits.max_num_seqs and self._allocate(self.waiting[0]):
            self.start(self.waiting.pop(0))

    def _allocate(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its known tokens, cached prefix first."""
        cached = self.cached_prefix(sequence)
        needed = -(-len(sequence.tokens) // self._block_size) - len(cached)
        reserve = self._limits.reserve_blocks if self.running and not sequence.hold else 0
        if not self._blocks.can_allocate(needed + reserve, cached):
            return False
        self._blocks.retain(cached)
        sequence.block_ids = cached + self._blocks.allocate(needed)
        sequence.num_computed = sequence.num_cached = len(cached) * self._block_size
        sequence.num_published = len(cached)
        return True

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix, at least its last token left to compute.

        Prompt log-probs need every row computed, so such a request reads no prefix (it still publishes its own).
        """
        if not self._prefix_caching or sequence.wants_prompt_logprobs:
            return []
        count = (len(sequence.tokens) - 1) // self._block_size
        return self._blocks.lookup(sequence.block_hashes(self._block_size, count))

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure the next slot exists, preempting sequences of lower rank if need be; False: not this step."""
        while not self._has_slots(sequence):
            if self._blocks.can_allocate(1):
                sequence.block_ids += self._blocks.allocate(1)
                continue
            victim = self.running[-1]
            if len(self.running) == 1:
                return False  # the first waits for hand-offs in flight to let go
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _has_slots(self, sequence: Sequence) -> bool:
        return len(sequence.block_ids) * self._block_size >= len(sequence.tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._drop_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._insert(self.waiting, sequence)

    def _insert(self, members: list[Sequence], sequence: Sequence) -> None:
        if not sequence.arrival:
            self._arrivals += 1
            sequence.arrival = self._arrivals
        insort(members, sequence, key=lambda member: member.rank)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_published = 0
        if not sequence.num_output:
            sequence.prompt_logprobs.clear()
