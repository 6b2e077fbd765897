"""From what a request leaves open to sampling parameters with nothing left open."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.protocol.sampling import MAX_STOP_IDS, SamplingParams

COMPLETION_MAX_TOKENS = 16

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's generation config says where the client says nothing; None: the API's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a request now: `context` tokens in all.

    It comes from the model and from the smallest live KV pool: any worker may claim a request, so one that some
    worker could never hold is refused here.
    """

    context: int
    vocab_size: int


def context_exceeded(limit: int, detail: str, param: str) -> ContextLengthExceeded:
    """The error agents recognise by its first words."""
    message = f"This model's maximum context length is {limit} tokens. {detail} Please reduce the length."
    return ContextLengthExceeded(message, param)


def resolve_params(
    body: ChatBody | CompletionBody,
    prompt_len: int,
    limits: Limits,
    defaults: SamplingDefaults,
    eos_ids: Sequence[int],
) -> SamplingParams:
    """Sampling parameters of one prompt of `prompt_len` tokens. Raises RequestError."""
    max_tokens = _max_tokens(body, prompt_len, limits)
    if body.min_tokens and body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must not be larger than the {max_tokens} tokens there is room for.", "min_tokens"
        )
    top_k = _first(body.top_k, defaults.top_k, 0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(64) if body.seed is None else body.seed & _SEED_MASK,
        min_tokens=body.min_tokens or 0,
        temperature=float(_first(body.temperature, defaults.temperature, 1.0)),
        top_k=0 if top_k <= 0 else min(int(top_k), limits.vocab_size),
        top_p=float(_first(body.top_p, defaults.top_p, 1.0)),
        min_p=float(_first(body.min_p, defaults.min_p, 0.0)),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(_first(body.repetition_penalty, defaults.repetition_penalty, 1.0)),
        logit_bias=_logit_bias(body, limits.vocab_size),
        stop_ids=_stop_ids(body, eos_ids, limits.vocab_size),
        n=body.n,
        logprobs=body.logprobs_wanted,
        prompt_logprobs=_prompt_logprobs(body),
        proposers=body.speculation,
    )


def scores_only(body: ChatBody | CompletionBody) -> bool:
    """Whether the client wants its prompt back with log-probabilities and no token more (max_tokens 0)."""
    return body.tokens_wanted == 0


FIRST = -1
"""Priority on the workers of a newcomer's request, which no client with a key can ask for."""


def worker_priority(priority: int, key_id: str) -> int:
    """Priority on the workers, where requests of all keys meet: among keys nobody may put itself before the others."""
    return max(0, priority) if key_id else priority


def _max_tokens(body: ChatBody | CompletionBody, prompt_len: int, limits: Limits) -> int:
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    if prompt_len >= limits.context:
        limit = limits.context
        raise context_exceeded(limit, f"However, your {param} resulted in {prompt_len} tokens.", param)
    room = limits.context - prompt_len
    wanted = body.tokens_wanted
    if wanted is None:
        return room if isinstance(body, ChatBody) else min(COMPLETION_MAX_TOKENS, room)
    if wanted > room:
        detail = (
            f"However, you requested {prompt_len + wanted} tokens ({prompt_len} in the {param}, {wanted} to generate)."
        )
        raise context_exceeded(limits.context, detail, param)
    return max(wanted, 1)


def _stop_ids(body: GenerationBody, eos_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if any(token >= vocab_size for token in body.stop_token_ids):
        raise InvalidRequest("stop_token_ids holds a token id that is out of vocabulary.", "stop_token_ids")
    ids = tuple(dict.fromkeys([*(() if body.ignore_eos else eos_ids), *body.stop_token_ids]))
    if len(ids) > MAX_STOP_IDS:
        raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP_IDS} ids can end a request.", "stop_token_ids")
    return ids


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if any(token >= vocab_size for token, _ in body.logit_bias):
        raise InvalidRequest("logit_bias holds a token id that is out of vocabulary.", "logit_bias")
    return body.logit_bias


def _prompt_logprobs(body: ChatBody | CompletionBody) -> int | None:
    """Asked for by name, or by `echo` together with `logprobs`."""
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return otherwise if default is None else default
