"""From a job and its journal to sequences: where a request stands and what is left to compute.

The hand-off covers the positions all choices have in common: prompt and output for a single choice, the prompt for
several. What a choice has beyond that (after a migration) the decode engine computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.engine.engine import Sampled
from shared.engine.sequence import Sequence
from shared.kv.block_manager import chain_root
from shared.protocol.journal import JournalState, chain
from shared.protocol.messages import Job, TokenLogprob, Tokens


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What the bits in a KV block depend on beside tenant and tokens."""

    revision: str
    kv_dtype: str
    numerics: str

    def root(self, job: Job) -> bytes:
        """Root of the job's block-hash chain; other tenants, models or arithmetic never share a block."""
        return chain_root(job.tenant, job.model, self.revision, job.adapter, self.kv_dtype, self.numerics)


def prefill_sequence(job: Job, state: JournalState, scope: CacheScope) -> Sequence:
    """The one sequence a prefill worker computes; it samples every choice that continues right after it."""
    tokens = list(job.prompt_ids)
    choices = tuple(range(job.params.n))
    if job.params.n == 1:
        tokens += state.choices[0].tokens
    elif any(choice.tokens for choice in state.choices):
        choices = ()
    root = scope.root(job)
    return Sequence(
        job.request_id, job.params, tokens, len(job.prompt_ids), choices, root, hold=True, priority=job.priority
    )


def decode_sequences(job: Job, state: JournalState, scope: CacheScope) -> list[Sequence]:
    """One sequence for each choice that is not finished yet."""
    root = scope.root(job)
    prompt = job.prompt_ids
    return [
        Sequence(
            *(job.request_id, job.params, [*prompt, *choice.tokens], len(prompt), (index,), root), priority=job.priority
        )
        for index, choice in enumerate(state.choices)
        if choice.finish is None
    ]


def overdue_finishes(job: Job, state: JournalState) -> list[Tokens]:
    """Finishing events of choices whose tokens already end them; a resubmitted request can have such."""
    events = []
    for index, choice in enumerate(state.choices):
        reason = job.params.finish_reason(choice.tokens)
        if reason is not None and choice.finish is None:
            n = len(choice.tokens)
            events.append(Tokens(index, n, choice.h, choice.h, (), finish=reason))
    return events


def tokens_event(
    state: JournalState, samples: list[Sampled], prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
) -> Tokens:
    """The journal event for consecutive samples of one choice, continuing `state` (which is not changed)."""
    choice = samples[0].choice
    held = state.choices[choice]
    tokens = tuple([sample.token for sample in samples])
    return Tokens(
        choice,
        len(held.tokens),
        held.h,
        chain(held.h, tokens),
        tokens,
        tuple([sample.logprob for sample in samples if sample.logprob is not None]),
        samples[-1].finish,
        prompt_logprobs if choice == 0 and not held.tokens else (),
    )


def events_from(state: JournalState, choice: int, base: int, finish: str | None) -> Tokens:
    """All tokens of a choice from `base` on, again: Redis forgot its last writes."""
    held = state.choices[choice]
    tokens = tuple(held.tokens[base:])
    logprobs = tuple(held.logprobs[index] for index in range(base, len(held.tokens)) if index in held.logprobs)
    return Tokens(choice, base, held.hash_at(base), held.h, tokens, logprobs, finish)
