"""The request bodies, validated once here and trusted inside.

Types are strict: `true` is no number and `"1"` no integer. Unknown fields are ignored, unknown
values of known fields are refused, and fields that would change the answer but are not supported
are refused by name unless they are at their default.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from services.gateway.fields import (
    MAX_TOKEN_ID,
    Message,
    Prompt,
    check_logit_bias,
    check_messages,
    check_prompt,
    check_proposers,
    check_stop,
    check_stream_options,
    check_template_kwargs,
    check_token_ids,
    check_unsupported,
)
from shared.errors import InvalidRequest, RequestTooLarge
from shared.protocol.sampling import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_IDS

_SEED_MIN, _SEED_MAX = -(2**63), 2**64 - 1
_MAX_PRIORITY = 1000
_MAX_TIMEOUT_S = 86400
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MARKS = (b",", b":", b"[", b"{")
_COUNTED_AT_ONCE = 1 << 20

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "function_call", "prompt_embeds", "prediction", "documents"), ()),
    **dict.fromkeys(("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("chat_template", "kv_transfer_params", "logits_processors", "allowed_token_ids", "audio"), ()),
    **dict.fromkeys(("web_search_options", "mm_processor_kwargs", "truncate_prompt_tokens"), ()),
    "suffix": ("",),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "images": ([],),
    "spaces_between_special_tokens": (True,),
}
"""Field → the values besides null that mean "not used"."""

IGNORED = frozenset(
    {
        *("metadata", "store", "service_tier", "reasoning_effort", "parallel_tool_calls", "safety_identifier"),
        *("verbosity", "prompt_cache_key", "request_id", "best_of"),
    }
)
"""Known fields that change nothing here."""

_Seed = Annotated[int, Field(ge=_SEED_MIN, le=_SEED_MAX)]
_Count = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
_Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_StopIds = Annotated[tuple[int, ...], BeforeValidator(lambda value: _stop_ids(value))]

RequestT = TypeVar("RequestT", bound="Body")


def _stop_ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else check_token_ids(value, "stop_token_ids")
    if len(ids) > MAX_STOP_IDS // 2:
        raise InvalidRequest(f"stop_token_ids may hold at most {MAX_STOP_IDS // 2} ids.", "stop_token_ids")
    return ids


class Body(BaseModel):
    """Base of all bodies. `model` may be left out, since a gateway serves one model."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    model: str | None = None


class StreamOptions(BaseModel):
    """`continuous_usage_stats` (vLLM) puts the usage so far into every chunk."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationBody(Body):
    """What chat and text completions have in common."""

    stream: bool = False
    stream_options: Annotated[StreamOptions | None, BeforeValidator(check_stream_options)] = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(check_logit_bias)] = ()
    stop: Annotated[tuple[str, ...], BeforeValidator(check_stop)] = ()
    stop_token_ids: _StopIds = ()
    speculation: Annotated[tuple[str, ...] | None, BeforeValidator(check_proposers)] = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    prompt_logprobs: _Logprobs | None = None
    seed: _Seed | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-_MAX_PRIORITY, le=_MAX_PRIORITY)] = 0
    timeout: Annotated[float, Field(gt=0, le=_MAX_TIMEOUT_S)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def tokens_wanted(self) -> int | None:
        """The client's limit of output tokens, None when it set none."""
        return self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        """How many alternatives a token's log-probability comes with, None for no log-probabilities."""
        return None

    @model_validator(mode="after")
    def _agree(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true.", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of is supported only when equal to n.", "best_of", "unsupported_parameter")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed; set stream to false.", "prompt_logprobs")
        limit = self.tokens_wanted
        if self.min_tokens and limit is not None and self.min_tokens > limit:
            raise InvalidRequest("min_tokens must not be larger than max_tokens.", "min_tokens")
        return self


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], BeforeValidator(check_messages)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: Literal[False] = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(check_template_kwargs)] = {}

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatBody:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequest("max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")
        if self.max_tokens == 0:
            raise InvalidRequest("max_tokens must be at least 1.", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
        _check_continuation(self.add_generation_prompt, self.continue_final_message, self.model_fields_set)
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions. `max_tokens` 0 is allowed with `echo`, to score a prompt."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(check_prompt)]
    logprobs: _Logprobs | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _completion_agrees(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 unless echo is true.", "max_tokens")
        if self.echo and self.logprobs is not None and self.stream:
            raise InvalidRequest("echo with logprobs cannot be streamed; set stream to false.", "logprobs")
        return self


class TokenizeBody(Body):
    """POST /tokenize: either `prompt` or `messages`."""

    prompt: str | None = None
    messages: Annotated[tuple[Message, ...], BeforeValidator(check_messages)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(check_template_kwargs)] = {}

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give either prompt or messages.", "prompt")
        _check_continuation(self.add_generation_prompt, self.continue_final_message, self.model_fields_set)
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[tuple[int, ...], BeforeValidator(lambda value: check_token_ids(value, "tokens"))]


def check_size(raw: bytes, max_values: int) -> None:
    """Raises RequestTooLarge for a body that would take long to decode, which nothing can interrupt.

    Commas, colons and opening brackets bound the number of values from above; those inside of texts count too.
    """
    values = 0
    for start in range(0, len(raw), _COUNTED_AT_ONCE):
        values += sum(raw.count(mark, start, start + _COUNTED_AT_ONCE) for mark in _MARKS)
        if values > max_values:
            raise RequestTooLarge(f"The body holds more than {max_values} values; send fewer in one request.")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body as an object. Duplicate keys: the last wins. Raises InvalidRequest."""
    try:
        body = json.loads(raw.decode("utf-8"))
        if _SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise InvalidRequest("The body is not valid UTF-8 text.", None, "invalid_encoding") from None
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON.", None, "invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", None, "invalid_json")
    return body


def validate(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """Check a decoded body; null means "not given". Raises InvalidRequest naming the first field at fault."""
    if issubclass(kind, GenerationBody):
        check_unsupported(body, UNSUPPORTED)
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        path = _path(first["loc"])
        param = "stream_options" if path.startswith("stream_options") else path
        raise InvalidRequest(f"{path}: {first['msg']}.", param) from None


def unknown_fields(kind: type[Body], body: dict[str, Any]) -> int:
    """How many fields of the body mean nothing to us."""
    return len(body.keys() - kind.model_fields.keys() - UNSUPPORTED.keys() - IGNORED)


def _path(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` → `messages[0].role`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _check_continuation(add_generation_prompt: bool, continue_final: bool, given: set[str]) -> None:
    if continue_final and add_generation_prompt and "add_generation_prompt" in given:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message cannot both be true.", "continue_final_message"
        )
