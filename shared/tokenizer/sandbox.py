"""Run a model's chat template without trusting it: no attributes of Python, no endless loop, no flood of text.

A chat template is a program that came with the weights. It runs in Jinja's immutable sandbox, with
the few filters templates use, no loader, and a budget:

- every iteration of a loop and every call checks a deadline, so a template that only computes stops;
- every operation that can make a value much larger than its operands is checked beforehand;
- the output is counted while it is generated.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_BUDGET = "slipstream budget"  # the blanks in these names keep templates from using them
_EACH = "slipstream each"
_CONCAT = "slipstream concat"
_MAX_INT_BITS = 4096
_MAX_INDENT = 64

_KEPT_FILTERS = (
    "abs",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "int",
    "items",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "select",
    "selectattr",
    "sort",
    "sum",
    "unique",
)
_TEXT_FILTERS = ("capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "upper")
_DENIED_STR_METHODS = frozenset(
    ("center", "encode", "expandtabs", "format", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill")
)


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """`max_chars` bounds the output and every value on the way to it; `max_seconds` the whole render."""

    max_chars: int = 8 * 1024 * 1024
    max_seconds: float = 2.0


class TemplateRefusal(TemplateError):
    """The template itself said no, through raise_exception; the message is meant for the client."""


class TemplateTooCostly(TemplateError):
    """The render went over its limits."""


class Budget:
    """What one render may still use."""

    __slots__ = ("_deadline", "max_chars")

    def __init__(self, limits: RenderLimits) -> None:
        self.max_chars = limits.max_chars
        self._deadline = time.monotonic() + limits.max_seconds

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise TemplateTooCostly("it ran longer than its time limit")

    def allow(self, size: int) -> None:
        if size > self.max_chars:
            raise TemplateTooCostly(f"it would produce more than {self.max_chars} characters")

    def allow_value(self, *values: object) -> None:
        """Count what the values would be as text, without making it; shared parts count each time they occur."""
        size, stack = 0, list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, Mapping):
                stack.extend(value.keys())
                stack.extend(value.values())
            elif isinstance(value, list | tuple | set | frozenset):
                stack.extend(value)
            size += 1
            self.allow(size + len(stack))


def _budget(context: Context) -> Budget:
    budget = context.parent[_BUDGET]
    if not isinstance(budget, Budget):
        raise SecurityError("the render has no budget")
    return budget


class _Namespace(Namespace):
    """Jinja's namespace without underscore names, which could shadow what the sandbox relies on."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have the attribute {name!r}")
        super().__setitem__(name, value)


def make_namespace(**attributes: Any) -> Namespace:
    namespace = _Namespace()
    for name, value in attributes.items():
        namespace[name] = value
    return namespace


def make_dict(**items: Any) -> dict[str, Any]:
    return dict(**items)


def raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _escape_non_ascii(text: str) -> str:
    """JSON's \\u escapes for all but ASCII and lone surrogates, which stand for hidden ASCII here."""
    return re.sub(r"[^\x00-\x7f\ud800-\udfff]", lambda match: json.dumps(match[0])[1:-1], text)


@pass_context
def tojson(
    context: Context,
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: no HTML escaping, non-ASCII kept."""
    _budget(context).allow_value(value)
    if indent is not None and not 0 <= int(indent) <= _MAX_INDENT:
        raise SecurityError(f"tojson's indent must be between 0 and {_MAX_INDENT}")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _escape_non_ascii(text) if ensure_ascii else text


def _of_text(name: str) -> Callable[..., Any]:
    """A filter that first makes a string of its input, with the size of that string checked."""

    @pass_context
    def checked(context: Context, value: object, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, str):
            _budget(context).allow_value(value)
        return FILTERS[name](value, *args, **kwargs)

    return checked


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    _budget(context).allow_value(*items, *([d] * len(items) if len(d) < 64 else []))
    _budget(context).allow(len(d) * len(items))
    joined: str = FILTERS["join"](context.eval_ctx, items, d, attribute)
    return joined


@pass_context
def _replace(context: Context, value: object, old: str, new: str, count: int | None = None) -> str:
    _budget(context).allow_value(value)
    text = str(value)
    _allow_replace(_budget(context), text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@pass_context
def _indent(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    columns = len(width) if isinstance(width, str) else width
    if columns > _MAX_INDENT:
        raise SecurityError(f"indent's width must be at most {_MAX_INDENT}")
    _budget(context).allow(len(text) + columns * (text.count("\n") + 1))
    indented: str = FILTERS["indent"](text, width, first, blank)
    return indented


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for value in values:
        budget.tick()
        yield value


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    _budget(context).allow_value(*parts)
    return "".join(map(str, parts))


def _allow_replace(budget: Budget, text: str, old: str, new: str) -> None:
    times = text.count(old) if old else len(text) + 1
    budget.allow(len(text) + times * len(new))


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; when serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guard(NodeTransformer):
    """Route every loop and every `~` of a parsed template through the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not supported in a chat template", node.lineno)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _EACH, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _CONCAT, [], [], None, None, lineno=node.lineno)


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled in; holds no state of a render."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: FILTERS[name] for name in _KEPT_FILTERS}
        self.filters |= {name: _of_text(name) for name in _TEXT_FILTERS}
        self.filters |= {"tojson": tojson, "join": _join, "replace": _replace, "indent": _indent}
        self.filters |= {_EACH: _each, _CONCAT: _concat}
        self.globals = {
            "range": safe_range,
            "dict": make_dict,
            "namespace": make_namespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self.finalize = _finalize

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guard().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's own hook for str.format, whose widths are a way to any amount of memory."""
        if isinstance(getattr(value, "__self__", None), str) and getattr(value, "__name__", "") in _DENIED_STR_METHODS:
            raise SecurityError(f"the string method {value.__name__} is not supported in chat templates; use ~")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _DENIED_STR_METHODS:
            return False
        return not isinstance(obj, Budget) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            items: list[Any] = list(*args)
            budget.allow_value(*items)
            budget.allow(len(owner) * len(items))
            return owner.join(items)
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            _allow_replace(budget, owner, args[0], args[1])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(_budget(context), operator, left, right)
        return super().call_binop(context, operator, left, right)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        _budget(context).allow_value(value)
    return value


def _check_binop(budget: Budget, operator: str, left: Any, right: Any) -> None:
    sized = (str, list, tuple)
    if isinstance(left, sized) and operator == "%":
        _check_format(str(left))
        budget.allow_value(left, right)
    elif isinstance(left, sized) and isinstance(right, sized):
        budget.allow(len(left) + len(right))
    elif operator == "*" and isinstance(left, sized) and isinstance(right, int):
        budget.allow(len(left) * right)
    elif operator == "*" and isinstance(right, sized) and isinstance(left, int):
        budget.allow(len(right) * left)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_INT_BITS:
            raise TemplateTooCostly("it computes with numbers that are too large")


def _check_format(pattern: str) -> None:
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4,})", pattern):
        raise SecurityError("a % format may not have a width of four digits or more, or one given as *")


def compile_template(source: str) -> Template:
    """Compile a chat template. Raises jinja2.TemplateError (a syntax error, an unknown filter or test)."""
    return ChatSandbox().from_string(source)


def render_bounded(template: Template, variables: Mapping[str, object], limits: RenderLimits) -> str:
    """Render within the limits. Raises whatever the template's own code raises, TemplateTooCostly beyond them."""
    budget = Budget(limits)
    parts: list[str] = []
    size = 0
    for part in template.generate({**variables, _BUDGET: budget}):
        budget.tick()
        size += len(part)
        budget.allow(size)
        parts.append(part)
    return "".join(parts)
