"""Chat messages to prompt text, with the model's own template.

`ChatTemplate.render` returns the text already cut into what the template wrote as control tokens and
everything else, so that whatever encodes it cannot mistake the one for the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Template
from jinja2.exceptions import TemplateError

from shared.errors import ConfigurationError, InvalidRequest
from shared.tokenizer.sandbox import (
    RenderLimits,
    TemplateRefusal,
    TemplateTooCostly,
    compile_template,
    render_bounded,
)
from shared.tokenizer.shadow import TAIL, Shadow, check_text, map_strings

Message = Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_TEMPLATE_CHARS = 1 << 20
_MAX_REASON_CHARS = 300
_OWN_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "eos_token",
        "messages",
        "pad_token",
        "return_dict",
        "tokenize",
        "tools",
        "unk_token",
    }
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered prompt; `is_special` when the template wrote it as one control token."""

    text: str
    is_special: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered prompt. Only segments marked special may become control tokens."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """What a model brings: its template (None: none), the one for requests with tools, the special tokens by role."""

    text: str | None
    tool_text: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


class ChatTemplate:
    """Renders conversations; keeps no state of a request and may be used from several threads."""

    def __init__(
        self, source: TemplateSource, control_tokens: Sequence[str], limits: RenderLimits | None = None
    ) -> None:
        """Raises ConfigurationError when there is no template or one does not compile."""
        if source.text is None:
            raise ConfigurationError("The model has no chat template; give one with --chat-template.")
        self._plain = _compile(source.text)
        self._with_tools = self._plain if source.tool_text is None else _compile(source.tool_text)
        self._variables = dict(source.variables)
        self._knows_developer = "developer" in source.text + (source.tool_text or "")
        self._shadow = Shadow(control_tokens)
        self._limits = limits or RenderLimits()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> Rendered:
        """Render a conversation; `variables` are the client's chat_template_kwargs.

        Raises InvalidRequest (param "messages", or the field at fault) when the messages do not
        suit the template, when the template refuses them, or when rendering exceeds its limits.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false.",
                param="continue_final_message",
            )
        chat = [self._message(message, index) for index, message in enumerate(messages)]
        given = {"messages": chat, "tools": list(tools) if tools else None, **_checked(variables or {})}
        map_strings(given, _valid)
        if continue_final_message:
            _mark_end(chat)
        template = self._with_tools if tools else self._plain
        fixed = {**self._variables, "add_generation_prompt": add_generation_prompt}
        pieces = self._render_safely(template, given, fixed, continue_final_message)
        segments = (Segment(self._shadow.restore(text), index % 2 == 1) for index, text in enumerate(pieces))
        return Rendered(tuple(segment for segment in segments if segment.text))

    def _render_safely(
        self, template: Template, given: dict[str, object], fixed: Mapping[str, object], cut: bool
    ) -> list[str]:
        """Render with whole control tokens hidden, and prove that client text formed none on the way.

        A template may trim, split and join, and so assemble a control token from parts that were
        harmless. The proof is a second render in which client text cannot contribute to any; the
        two must show the same control tokens, else the second one counts.
        """
        shadow = self._shadow
        pieces = shadow.split(self._run(template, _hide(given, shadow.hide_tokens), fixed, cut))
        guarded_input = _hide(given, shadow.hide_borders)
        if guarded_input == given:
            return pieces
        guarded = shadow.split(self._run(template, guarded_input, fixed, cut))
        return pieces if pieces[1::2] == guarded[1::2] else guarded

    def _run(self, template: Template, given: Mapping[str, object], fixed: Mapping[str, object], cut: bool) -> str:
        try:
            text = render_bounded(template, {**given, **fixed}, self._limits)
        except TemplateRefusal as refusal:
            raise InvalidRequest(self._reason(str(refusal)), param="messages") from None
        except Exception as error:
            # The template is foreign code: whatever it trips over, it cannot render these messages. What Python says
            # about it may hold the client's text or an object's address, so only our own limits are quoted.
            reason = str(error) if isinstance(error, TemplateTooCostly) else type(error).__name__
            raise InvalidRequest(f"The model's chat template cannot render this: {reason}.", param="messages") from None
        return _cut_at_tail(text) if cut else text

    def _reason(self, message: str) -> str:
        text = self._shadow.restore(message).replace(TAIL, "").encode(errors="replace").decode()
        return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 1] + "…"

    def _message(self, message: Message, index: int) -> dict[str, object]:
        """The message as templates expect it: text content as one string, tool arguments as an object."""
        role = message.get("role")
        if role not in ROLES:
            raise InvalidRequest(
                f"The role of message {index} must be one of {', '.join(ROLES)}.", param=f"messages[{index}].role"
            )
        if role == "developer" and not self._knows_developer:
            role = "system"
        changed: dict[str, object] = {**message, "role": role, "content": _content(message.get("content"), index)}
        calls = message.get("tool_calls")
        if isinstance(calls, list | tuple) and calls:
            changed["tool_calls"] = [_tool_call(call, f"messages[{index}].tool_calls") for call in calls]
        return changed


def _compile(source: str) -> Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ConfigurationError(f"The chat template is longer than {MAX_TEMPLATE_CHARS} characters.")
    try:
        return compile_template(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ConfigurationError(
            f"The chat template does not compile{where}: {error}. Give another one with --chat-template."
        ) from error
    except (SyntaxError, RecursionError, ValueError, OverflowError, TypeError) as error:
        raise ConfigurationError(
            f"The chat template does not compile: {error}. Give another one with --chat-template."
        ) from error


def _valid(text: str) -> str:
    check_text(text, "messages")
    return text


def _hide(given: Mapping[str, object], hide: Callable[[str], str]) -> dict[str, object]:
    """All client text hidden. Roles are one of ROLES and hold nothing to hide."""
    hidden = map_strings(given, hide)
    if not isinstance(hidden, dict):
        raise TypeError("a mapping stays a mapping")
    return hidden


def _content(content: object, index: int) -> str | None:
    """Text content as one string; a list of text parts is joined by newlines."""
    if content is None or isinstance(content, str):
        return content
    param = f"messages[{index}].content"
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{param} must be a string or a list of text parts.", param=param)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequest(f"{param} holds a part that is not text; this model reads text only.", param=param)
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: object, param: str) -> object:
    """A past tool call with its arguments parsed: clients send JSON text, templates expect the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidRequest(f"{param} holds a call without a function.", param=param)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{param} holds arguments that are not JSON.", param=param) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _checked(variables: Mapping[str, object]) -> Mapping[str, object]:
    reserved = sorted(name for name in variables if name in _OWN_VARIABLES or not name.isidentifier() or name[0] == "_")
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs may not hold {', '.join(map(repr, reserved))}; use its own field if it has one.",
            param="chat_template_kwargs",
        )
    return variables


def _mark_end(chat: list[dict[str, object]]) -> None:
    """Put the tail mark after the final message. The blank after it shows whether the template trims."""
    content = chat[-1].get("content") if chat else None
    if not isinstance(content, str):
        raise InvalidRequest(
            "continue_final_message needs a final message with text content.", param="continue_final_message"
        )
    chat[-1]["content"] = content + TAIL + " "


def _cut_at_tail(text: str) -> str:
    at = text.rfind(TAIL)
    if at < 0:
        raise InvalidRequest(
            "The model's chat template does not write the final message out, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()
