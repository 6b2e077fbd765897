"""Checks of the fields whose shape a type cannot say: messages, prompts, stops, biases.

Each function takes the raw JSON value and returns it in the one shape the rest of the gateway
uses, or raises InvalidRequest naming the field in the client's words (`messages[0].content`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shared.errors import InvalidRequest
from shared.protocol.sampling import MAX_LOGIT_BIAS, PROPOSER_NAMES

MAX_PROMPTS = 1024
"""No gateway takes more, so more are not even looked at; what it takes is a setting."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_BIAS = 100.0
MAX_TOKEN_ID = 2**31 - 1
MAX_TEMPLATE_KWARGS_BYTES = 16 * 1024
MAX_TEMPLATE_KWARGS_DEPTH = 16

STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"})

Prompt = str | tuple[int, ...]
Message = dict[str, str]

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
MEDIA_PARTS = frozenset(
    {"image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file", "image_embeds"}
)
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        *("messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "tools"),
        *("documents", "bos_token", "eos_token", "raise_exception", "strftime_now", "conversation", "return_dict"),
    }
)


def check_messages(value: Any) -> tuple[Message, ...]:
    """A chat: each message with a known role and text content; text parts are joined by line breaks."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    return tuple(_check_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _check_message(item: Any, at: str) -> Message:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{at} must be an object with role and content.", at)
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{at}.role must be one of {', '.join(sorted(_ROLES))}.", f"{at}.role")
    if role == "tool" and not isinstance(item.get("tool_call_id"), str):
        raise InvalidRequest(f"{at}.tool_call_id is needed in a tool message.", f"{at}.tool_call_id")
    for name in ("tool_calls", "function_call", "audio"):
        if item.get(name):
            raise InvalidRequest(f"{at}.{name} is not supported.", f"{at}.{name}", "unsupported_parameter")
    if role == "tool":
        raise InvalidRequest(f"{at}: tool messages are not supported.", f"{at}.role", "unsupported_value")
    message: Message = {"role": role, "content": _check_content(item, at)}
    author: Any = item.get("name")
    if author is not None:
        if not isinstance(author, str) or len(author) > 256:
            raise InvalidRequest(f"{at}.name must be a string of at most 256 characters.", f"{at}.name")
        message["name"] = author
    return message


def _check_content(item: Mapping[str, Any], at: str) -> str:
    at = f"{at}.content"
    content = item.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{at} must be a string or a list of text parts.", at)
    return "\n".join(_check_part(part, at, index) for index, part in enumerate(content))


def _check_part(part: Any, at: str, index: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        message = f"{at}[{index}]: this model reads text only, {kind} is not supported."
        raise InvalidRequest(message, f"{at}[{index}]", "unsupported_content")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(f'{at}: each part must be an object of type "text".', at)
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{at}[{index}].text must be a string.", f"{at}[{index}].text")
    return str(part["text"])


def check_prompt(value: Any) -> tuple[Prompt, ...]:
    """One or many prompts: a string, strings, token ids, or lists of token ids; none may be empty."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("prompt must be a string, a list of strings, token ids or lists of them.", "prompt")
    kinds = set(map(type, value))
    if len(value) > MAX_PROMPTS and not kinds <= {int}:
        raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts, it has {len(value)}.", "prompt")
    if kinds == {str}:
        prompts: tuple[Prompt, ...] = tuple(value)
    elif kinds == {list}:
        prompts = tuple(check_token_ids(ids, "prompt") for ids in value)
    else:
        prompts = (check_token_ids(value, "prompt"),)
    if not all(prompts):
        raise InvalidRequest("prompt must not be empty.", "prompt")
    return prompts


def check_token_ids(value: Any, param: str) -> tuple[int, ...]:
    """Token ids, each an integer that could be one; whether the vocabulary has it is known later."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be a list of token ids.", param)
    if not set(map(type, value)) <= {int}:
        raise InvalidRequest(f"{param} must hold integers only; strings and token ids cannot be mixed.", param)
    if value and not 0 <= min(value) <= max(value) <= MAX_TOKEN_ID:
        raise InvalidRequest(f"{param} holds a token id that is out of vocabulary.", param)
    return tuple(value)


def check_proposers(value: Any) -> tuple[str, ...] | None:
    """Names as a list or with commas between them; `none` for nobody."""
    names = value.split(",") if isinstance(value, str) else value
    if names is None or names == ["none"]:
        return None if names is None else ()
    known = isinstance(names, list) and 0 < len(names) <= len(PROPOSER_NAMES)
    if not known or any(name not in PROPOSER_NAMES for name in names):
        raise InvalidRequest(f"speculation must be none or some of {', '.join(PROPOSER_NAMES)}.", "speculation")
    return tuple(dict.fromkeys(names))


def check_stop(value: Any) -> tuple[str, ...]:
    """Stop strings: one, or up to 16, none of them empty."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not set(map(type, stops)) <= {str}:
        raise InvalidRequest("stop must be a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOPS} strings, it has {len(stops)}.", "stop")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise InvalidRequest(f"Each stop string must have 1 to {MAX_STOP_LENGTH} characters.", "stop")
    return tuple(stops)


def check_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Token id (as JSON key) → bias from -100 to 100."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InvalidRequest("logit_bias must be an object of token id: bias.", "logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias may hold at most {MAX_LOGIT_BIAS} tokens.", "logit_bias")
    return tuple(sorted(_check_bias(key, bias) for key, bias in value.items()))


def _check_bias(key: str, bias: Any) -> tuple[int, float]:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise InvalidRequest("logit_bias: each key must be a token id.", "logit_bias")
    if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
        raise InvalidRequest("logit_bias: each value must be a number from -100 to 100.", "logit_bias")
    return int(key), float(bias)


def check_template_kwargs(value: Any) -> dict[str, Any]:
    """Extra variables for the chat template, small and none of the template engine's own."""
    if value is None:
        return {}
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object.", param)
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & value.keys())
    if reserved:
        raise InvalidRequest(f"{param} may not set {', '.join(reserved)}.", param)
    if not all(name.isidentifier() and not name.startswith("_") for name in value):
        raise InvalidRequest(f"{param}: each name must be an identifier that does not begin with _.", param)
    if not _is_nested_at_most(value.values(), MAX_TEMPLATE_KWARGS_DEPTH):
        raise InvalidRequest(f"{param} may be nested at most {MAX_TEMPLATE_KWARGS_DEPTH} levels deep.", param)
    if len(json.dumps(value)) > MAX_TEMPLATE_KWARGS_BYTES:
        raise InvalidRequest(f"{param} may have at most {MAX_TEMPLATE_KWARGS_BYTES} bytes.", param)
    return value


def _is_nested_at_most(values: Iterable[Any], depth: int) -> bool:
    """Whether lists and objects stand at most `depth` deep in each other; recursion is bounded by `depth` too."""
    for value in values:
        if isinstance(value, list | dict):
            inner = value.values() if isinstance(value, dict) else value
            if depth == 0 or not _is_nested_at_most(inner, depth - 1):
                return False
    return True


def check_stream_options(value: Any) -> Any:
    """The options by name, so that a refusal need not repeat the client's; their values are checked later."""
    if isinstance(value, dict) and not value.keys() <= STREAM_OPTIONS:
        known = ", ".join(sorted(STREAM_OPTIONS))
        raise InvalidRequest(f"stream_options holds an unknown option; known are {known}.", "stream_options")
    return value


def check_unsupported(body: Mapping[str, Any], defaults: Mapping[str, Sequence[Any]]) -> None:
    """Refuse by name what would change the answer and is not supported, unless it is at its default."""
    for name in sorted(body.keys() & defaults.keys()):
        value = body[name]
        unused = any(type(value) is type(default) and value == default for default in defaults[name])
        if value is not None and not unused:
            raise InvalidRequest(f"{name} is not supported; leave it out.", name, "unsupported_parameter")
