"""The engine: a step is schedule → run → commit, on one thread, over token ids only.

The same engine serves both services. A prefill service adds sequences that hold their blocks after one sample; a
decode service reserves blocks for a hand-off, starts the sequences once the KV is in, and lets them run to
their end. Sequences with several tokens to compute and sequences with one share a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from shared.engine.batch import build_step, rows_with_logits
from shared.engine.calibration import Calibration
from shared.engine.draws import plan_draws
from shared.engine.noise import F32
from shared.engine.runner import Runner, StepResult
from shared.engine.sampler import sample, token_logprob
from shared.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from shared.engine.sequence import Sequence, Status
from shared.engine.speculation import Speculation
from shared.kv.block_manager import BlockManager
from shared.protocol.messages import TokenLogprob

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of one choice."""

    choice: int
    token: int
    logprob: TokenLogprob | None
    finish: str | None


@dataclass(frozen=True, slots=True)
class Output:
    """What one step did for one sequence. `error` ends the sequence; its blocks are freed already."""

    sequence: Sequence
    samples: tuple[Sampled, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_computed: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """A snapshot for heartbeats and admission, in tokens and sequences.

    `sequence_steps` counts a step once for each sequence it gave tokens; `drafted` and `accepted` count guesses by
    their place in a draft.
    """

    running: int
    waiting: int
    held: int
    kv_tokens: int
    kv_tokens_used: int
    generated_tokens: int
    computed_tokens: int
    preemptions: int
    steps: int
    sequence_steps: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks for the choices of one hand-off; the first sequence's blocks are where the KV goes.

    `num_tokens` positions come by hand-off, of which the first `num_cached` are in the local prefix cache already.
    """

    sequences: list[Sequence]
    num_tokens: int
    num_cached: int


class Engine:
    """Schedules, runs and commits; all methods but `load` are to be called on the one engine thread."""

    def __init__(
        self,
        runner: Runner,
        limits: SchedulerLimits,
        *,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self._runner = runner
        self.speculation = speculation
        self._block_size = runner.cache.layout.block_size
        self._prefix_caching = prefix_caching
        self.blocks = BlockManager(runner.cache.num_blocks)
        self.scheduler = Scheduler(limits, self.blocks, self._block_size, prefix_caching=prefix_caching)
        self._reservations: list[Reservation] = []
        self._generated = self._computed = self._steps = self._sequence_steps = 0
        self._ran_until = 0.0
        self._calibration: Calibration | None = None
        if speculation is not None and not speculation.tables:
            self._calibration = Calibration(
                speculation.tables, runner, self.blocks, self._block_size, limits.max_num_batched_tokens
            )

    @property
    def max_request_tokens(self) -> int:
        """The longest sequence that fits when it has the whole pool."""
        return self.blocks.num_usable * self._block_size

    @property
    def model_s(self) -> float:
        """Processor time the engine's thread has spent in the model."""
        return self._runner.model_s

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def load(self) -> Load:
        """Counts for heartbeats. From another thread they may be of two neighbouring steps, which does no harm."""
        scheduler, blocks = self.scheduler, self.blocks
        drafted, accepted = self.speculation.totals() if self.speculation is not None else ((), ())
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._reservations),
            held=len(scheduler.held),
            kv_tokens=blocks.num_usable * self._block_size,
            kv_tokens_used=(blocks.num_usable - blocks.num_free) * self._block_size,
            generated_tokens=self._generated,
            computed_tokens=self._computed,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            sequence_steps=self._sequence_steps,
            drafted=drafted,
            accepted=accepted,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence to be computed here from its first token."""
        self.scheduler.add(sequence)

    def free(self, sequence: Sequence) -> None:
        """End a sequence in any state and release its blocks. May be repeated."""
        self.scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)

    def free_all(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.free(sequence)

    def retain_blocks(self, sequence: Sequence) -> list[int]:
        """Give a hand-off its own reference to the sequence's blocks, so that they outlive the sequence."""
        blocks = list(sequence.block_ids)
        self.blocks.retain(blocks)
        return blocks

    def release_blocks(self, blocks: list[int]) -> None:
        """The hand-off's reader has let go."""
        self.blocks.release(blocks)

    def step(self) -> list[Output]:
        """Compute one ragged batch; an empty list means that nothing could run."""
        plan = self.scheduler.schedule()
        if not plan:
            self._ran_until = 0.0
            return []
        if self.speculation is not None:
            plan = self.speculation.extend(plan, self.scheduler, self._runner.num_cores)
        self._zero_fresh()
        outputs = self.commit(plan, self._run(plan))
        if not self.has_work:
            self._ran_until = 0.0  # what comes now is a pause, not time that a step takes
        return outputs

    def calibrate(self) -> bool:
        """With nothing to do, measure what steps cost; False when that is known."""
        return self._calibration is not None and self._calibration.advance()

    def commit(self, plan: list[Scheduled], result: StepResult) -> list[Output]:
        """Advance the planned sequences and sample; a sequence ended since the plan was made is passed over."""
        self._steps += 1
        outputs, row, all_drawn = [], 0, result.drawn.tolist()
        for item in plan:
            rows = slice(row, row + len(rows_with_logits(item)))
            row = rows.stop
            if item.sequence.status is Status.RUNNING:
                outputs.append(self._commit_one(item, result.logits[rows], all_drawn[rows], result.hidden[rows]))
        return outputs

    def reserve(self, sequences: list[Sequence], num_tokens: int, growth: int) -> Reservation | None:
        """Reserve zeroed blocks for `num_tokens` handed-off positions plus `growth`, or None when they are not free.

        All sequences share the full blocks of the handed-off prefix; each has its own tail. Only the first has to fit:
        the others queue for their blocks when they do not. Waiting local work goes first, it was admitted earlier.
        """
        first, size = sequences[0], self._block_size
        cached = self.scheduler.cached_prefix(first)[: num_tokens // size]
        longest = max(num_tokens, *(len(sequence.tokens) for sequence in sequences))  # choices that were moved here
        each, shared = min(-(-(longest + growth) // size), self.blocks.num_usable), num_tokens // size
        if self.scheduler.waiting or not self.blocks.can_allocate(each - len(cached), cached):
            return None
        self.blocks.retain(cached)
        first.block_ids = cached + self.blocks.allocate(each - len(cached))
        for fork in sequences[1:]:
            if self.blocks.can_allocate(each - shared):
                self.blocks.retain(first.block_ids[:shared])
                fork.block_ids = first.block_ids[:shared] + self.blocks.allocate(each - shared)
        self._zero_fresh()
        reservation = Reservation(sequences, num_tokens, len(cached) * size)
        self._reservations.append(reservation)
        return reservation

    def cancel_reservation(self, reservation: Reservation) -> None:
        """Give a reservation's blocks back; its writer must have stopped. May be repeated."""
        if reservation in self._reservations:
            self._reservations.remove(reservation)
            self.free_all(reservation.sequences)

    def start_received(self, reservation: Reservation) -> None:
        """Run the sequences on KV that was verified: their first `num_tokens` positions are in the cache."""
        self._reservations.remove(reservation)
        shared, tail = divmod(reservation.num_tokens, self._block_size)
        first = reservation.sequences[0]
        for sequence in reservation.sequences:
            if not sequence.block_ids:
                self.add(sequence)
                continue
            if tail and sequence is not first:
                self._runner.cache.copy_block(first.block_ids[shared], sequence.block_ids[shared])
            sequence.num_cached = reservation.num_cached
            sequence.num_computed = min(reservation.num_tokens, len(sequence.tokens) - 1)
            self._publish(sequence)
            self.scheduler.start(sequence)

    def start_recompute(self, reservation: Reservation) -> None:
        """Compute the sequences here because their KV did not come; half-written blocks are not trusted."""
        self.cancel_reservation(reservation)
        for sequence in reservation.sequences:
            self.add(sequence)

    def check_integrity(self, retained: list[list[int]] | None = None) -> None:
        """Raise AssertionError unless every block reference has a holder; `retained` are hand-offs' own references."""
        scheduler = self.scheduler
        members = [*scheduler.waiting, *scheduler.running, *scheduler.held]
        members += [sequence for reservation in self._reservations for sequence in reservation.sequences]
        self.blocks.check_integrity([sequence.block_ids for sequence in members] + (retained or []))

    def _run(self, plan: list[Scheduled]) -> StepResult:
        step, draws = build_step(plan, self._block_size), plan_draws(plan)
        began = time.perf_counter()
        result = self._runner.run(step, draws)
        ended = time.perf_counter()
        if self.speculation is not None:
            self.speculation.observe_step(plan, ended - began)
            if self._ran_until:
                self.speculation.observe_beside(began - self._ran_until)
        self._ran_until = ended
        return result

    def _commit_one(self, item: Scheduled, logits: F32, drawn: list[int], hidden: F32) -> Output:
        sequence = item.sequence
        first_row = sequence.num_computed
        sequence.num_computed += item.num_tokens
        self._computed += item.num_tokens
        self._publish(sequence)
        try:
            if sequence.wants_prompt_logprobs:
                self._collect_prompt_logprobs(sequence, first_row, logits)
            samples = self._sample(item, logits, drawn, hidden) if not sequence.num_pending else ()
        except Exception as error:  # one request's parameters must not take the batch down
            log.error("sequence_failed", request_id=sequence.request_id, error=type(error).__name__)
            self.free(sequence)
            return Output(sequence, error="the request failed while sampling")
        prompt_logprobs = tuple(sequence.prompt_logprobs) if samples else ()
        if samples and samples[-1].finish and not sequence.hold:
            self.free(sequence)
        if sequence.hold and not sequence.num_pending:
            self.scheduler.hold(sequence)
        return Output(sequence, samples, prompt_logprobs, sequence.num_computed)

    def _sample(self, item: Scheduled, logits: F32, drawn: list[int], hidden: F32) -> tuple[Sampled, ...]:
        """Every choice of a held sequence once; of any other its next token, and more where its draft was right."""
        sequence = item.sequence
        if sequence.hold:
            return tuple([self._sample_choice(sequence, choice, logits[-1], drawn[-1]) for choice in sequence.choices])
        samples = self._verify(sequence, item.draft, logits, drawn)
        self._sequence_steps += 1
        if self.speculation is not None:
            last = len(hidden) - 1 - len(item.draft) + len(samples) - 1
            self.speculation.learn(item, [sampled.token for sampled in samples], hidden[last])
        return samples

    def _verify(self, sequence: Sequence, draft: tuple[int, ...], logits: F32, drawn: list[int]) -> tuple[Sampled, ...]:
        """Sample and append the token after the last one known, and go on as long as the draft has guessed it.

        What is computed for a guess is right only behind right guesses; wrong ones' slots are written again later.
        """
        samples: list[Sampled] = []
        num_rows = 1 + len(draft)
        for logit_row, token, guess in zip(logits[-num_rows:], drawn[-num_rows:], (*draft, None), strict=True):
            if samples:
                sequence.num_computed += 1
            samples.append(self._sample_choice(sequence, sequence.choices[0], logit_row, token))
            sequence.tokens.append(samples[-1].token)
            if samples[-1].finish or samples[-1].token != guess:
                break
        self._publish(sequence)
        return tuple(samples)

    def _sample_choice(self, sequence: Sequence, choice: int, logits: F32, drawn: int) -> Sampled:
        """`drawn` is what the runner drew from this row for the sequence's only choice, -1 if it did not."""
        params = sequence.params
        token = drawn if drawn >= 0 else sample(logits, sequence.sample_input(choice))
        self._generated += 1
        logprob = None if params.logprobs is None else token_logprob(logits, token, params.logprobs)
        return Sampled(choice, token, logprob, params.finish_after(sequence.num_output + 1, token))

    def _collect_prompt_logprobs(self, sequence: Sequence, first_row: int, logits: F32) -> None:
        collected = sequence.prompt_logprobs
        if not collected:
            collected.append(None)  # nothing predicts the first token
        num_top = sequence.params.prompt_logprobs or 0
        for offset, row in enumerate(logits):
            target = first_row + offset + 1
            if target < sequence.prompt_len:
                collected.append(token_logprob(row, sequence.tokens[target], num_top))

    def _publish(self, sequence: Sequence) -> None:
        """Make newly full blocks findable by other sequences of the same root."""
        full = sequence.num_computed // self._block_size
        if not self._prefix_caching or full <= sequence.num_published:
            return
        hashes = sequence.block_hashes(self._block_size, full)
        for index in range(sequence.num_published, full):
            self.blocks.publish(sequence.block_ids[index], hashes[index])
        sequence.num_published = full

    def _zero_fresh(self) -> None:
        fresh = self.blocks.take_fresh()
        if fresh:
            self._runner.cache.zero(fresh)
