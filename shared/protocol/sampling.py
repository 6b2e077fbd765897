"""What a request asks of the sampler; the same record in the gateway, on the bus and in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DRAWS_VERSION = 2
"""Part of the numerics fingerprint; changes whenever the same logits and parameters could give another token."""

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 1024

PROPOSER_NAMES = ("suffix", "draft", "heads")
"""Who may guess tokens ahead (`shared.speculative.registry`)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling parameters: no defaults of the model left open, no unset seed.

    `stop_ids` holds every id that ends a choice: the model's end-of-sequence ids (left out under
    ignore_eos) and the request's stop_token_ids. `min_tokens` masks all of them. `seed` is
    unsigned 64-bit; the gateway draws it when the client gives none, so that a retry repeats the
    same tokens. `temperature` below 1e-5 is argmax. `top_k` 0 is off. `logprobs` None is off,
    k ≥ 0 asks for the chosen token's log-prob and the k best. `prompt_logprobs` likewise. `proposers` are those of the
    worker's that may guess tokens of this request, None for all: they change how fast tokens come, and no token.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    proposers: tuple[str, ...] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    def finish_reason(self, output_ids: Sequence[int]) -> str | None:
        """Why these output tokens end their choice: "stop" after a stop id, "length" at max_tokens, else None."""
        if not output_ids:
            return "length" if self.max_tokens == 0 else None
        return self.finish_after(len(output_ids), output_ids[-1])

    def finish_after(self, num_output: int, last: int) -> str | None:
        """The same for `num_output` ≥ 1 tokens of which `last` is the last one."""
        if num_output >= self.min_tokens and last in self.stop_ids:
            return "stop"
        return "length" if num_output >= self.max_tokens else None
