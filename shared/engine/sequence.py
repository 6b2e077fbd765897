"""One choice of a request inside the engine: its tokens, its blocks, how far it is computed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from shared.engine.sampler import SampleInput
from shared.kv.block_manager import chain_hash
from shared.protocol.messages import TokenLogprob
from shared.protocol.sampling import SamplingParams


class Status(enum.Enum):
    """Where a sequence stands; `HELD` keeps its blocks until its owner frees it."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    HELD = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens to compute and, at the end of them, choices to sample.

    `tokens` starts with the request's prompt (`prompt_len` of them, whatever was produced before a migration
    comes after). A decode sequence samples one choice and appends it; a prefill sequence (`hold`) samples
    each of `choices` once from its last row, appends nothing and keeps its blocks for the hand-off. A lower
    `priority` goes first; `arrival` is the scheduler's, 0 before it knows the sequence.
    """

    request_id: str
    params: SamplingParams
    tokens: list[int]
    prompt_len: int
    choices: tuple[int, ...]
    hash_root: bytes
    hold: bool = False
    priority: int = 0
    arrival: int = 0
    status: Status = Status.WAITING
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_published: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Where it stands among the sequences of the engine; the least goes first and is preempted last."""
        return self.priority, self.arrival

    @property
    def num_pending(self) -> int:
        """Tokens known but not in the cache; the last of them is the row to sample from."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.num_output == 0 and bool(self.choices)

    def block_hashes(self, block_size: int, count: int) -> list[bytes]:
        """Chained hashes of the first `count` full blocks."""
        while len(self._hashes) < count:
            start = len(self._hashes) * block_size
            parent = self._hashes[-1] if self._hashes else self.hash_root
            self._hashes.append(chain_hash(parent, self.tokens[start : start + block_size]))
        return self._hashes[:count]

    def sample_input(self, choice: int, draft: tuple[int, ...] = ()) -> SampleInput:
        """What the draw after these tokens and `draft` depends on."""
        output = self.tokens[self.prompt_len :]
        return SampleInput(self.params, choice, self.tokens[: self.prompt_len], [*output, *draft] if draft else output)
