"""Any chat template and any messages: a prompt or a refusal, within the limits. A template is a stranger's program."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from shared.errors import ConfigurationError, InvalidRequest
from shared.tokenizer.sandbox import RenderLimits, compile_template, render_bounded
from shared.tokenizer.template import ChatTemplate, Rendered, TemplateSource
from tests.fuzz.damage import allocates_at_most, refusal_of
from tests.text_models import CHATML, CONTROL

LIMITS = RenderLimits(max_chars=20_000, max_seconds=0.5)
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

names = st.sampled_from(["messages", "message", "loop", "ns", "x", "bos_token", "tools", "range", "dict", "namespace"])
attributes = st.sampled_from(
    [
        *("role", "content", "items", "keys", "append", "format", "join", "replace", "split", "upper", "index"),
        *("__class__", "__mro__", "__globals__", "__init__", "mro", "gi_frame", "_budget", "func_globals"),
    ]
)
filters = st.sampled_from(
    [
        *("trim", "length", "tojson", "join", "list", "map('upper')", "selectattr('role')", "indent(64)", "sort"),
        *("replace('a', 'aaaaaaaaaa')", "batch(2)", "string", "safe", "attr('__class__')", "first", "dictsort"),
    ]
)
literals = st.sampled_from(
    ["1", "-1", "99999", "2**64", "'a'", "'ab' * 3", "[1, 2]", "{'k': 1}", "none", "1.5", "'%s'"]
)
operators = st.sampled_from(["+", "*", "**", "~", "-", "//", "%", "==", "in", "and"])


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if not depth:
        return draw(names | literals)
    inner = expressions(depth - 1)
    kind = draw(st.integers(0, 8))
    first = draw(inner)
    if kind == 0:
        return f"{first}.{draw(attributes)}"
    if kind == 1:
        return (
            f"({first} {draw(st.sampled_from(['+', '*', '**', '~', '-', '//', '%', '==', 'in', 'and']))} {draw(inner)})"
        )
    if kind == 2:
        return f"{first}[{draw(inner)}]"
    if kind == 3:
        return f"({first} | {draw(filters)})"
    if kind == 4:
        return f"{first}({draw(inner)})"
    if kind == 5:
        return f"({first} if {draw(inner)} else {draw(inner)})"
    return first if kind > 6 else f"{first}[:{draw(inner)}]"


@st.composite
def templates(draw: st.DrawFn, depth: int = 2) -> str:
    parts = draw(st.lists(st.sampled_from(["text", "say", "for", "if", "set", "macro", "raise"]), max_size=4))
    done = []
    for part in parts:
        body = draw(templates(depth - 1)) if depth else "x"
        value = draw(expressions())
        done.append(
            {
                "text": draw(st.text(max_size=6)),
                "say": "{{ " + value + " }}",
                "for": "{% for x in " + value + " %}" + body + "{% endfor %}",
                "if": "{% if " + value + " %}" + body + "{% endif %}",
                "set": "{% set x = " + value + " %}",
                "macro": "{% macro m(x) %}" + body + "{% endmacro %}{{ m(" + value + ") }}",
                "raise": "{{ raise_exception(" + value + ") }}",
            }[part]
        )
    return "".join(done)


MESSAGES = [{"role": "user", "content": "aaaa"}, {"role": "assistant", "content": "b" * 50}]


def test_the_generator_reaches_programs_that_render() -> None:
    template = compile_template("{% for x in messages %}{{ (x.content | trim) ~ loop.index }}{% endfor %}")
    assert render_bounded(template, {"messages": MESSAGES}, LIMITS) == "aaaa1" + "b" * 50 + "2"


@FUZZ
@given(templates() | st.text(max_size=40))
def test_any_template_renders_or_fails_within_its_limits(source: str) -> None:
    """Any error is the template's; the memory stays within a few times the limit, and a hang would be seen here."""
    try:
        template = compile_template(source)
    except (TemplateError, SyntaxError, RecursionError, ValueError, OverflowError, TypeError):
        return  # what ChatTemplate turns into a ConfigurationError
    begun = time.monotonic()
    try:
        with allocates_at_most(8 << 20):
            text = render_bounded(template, {"messages": MESSAGES, "bos_token": "<s>", "tools": None}, LIMITS)
    except AssertionError:
        raise
    except Exception:
        text = ""  # what ChatTemplate turns into an InvalidRequest
    assert len(text) <= LIMITS.max_chars
    assert time.monotonic() - begun < 30, "the deadline of half a second did not stop it"


contents = st.text(max_size=12) | st.sampled_from(
    [*CONTROL, "<|im_", "end|>", "{{ 1 }}", "{% raw %}", "\x00", "\ud800"]
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | contents,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(contents, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]), anything)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": contents}),
    max_size=4,
)


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(TemplateSource(CHATML), CONTROL, LIMITS)


@FUZZ
@given(given_messages=messages, variables=st.dictionaries(contents, anything, max_size=2), flag=st.booleans())
def test_any_conversation_renders_or_is_refused(
    chat: ChatTemplate, given_messages: list[dict[str, Any]], variables: dict[str, Any], flag: bool
) -> None:
    """And client text never becomes one control token more than the template writes by itself."""
    rendered: list[Rendered] = []

    def render() -> None:
        chat_template = partial(chat.render, add_generation_prompt=not flag, continue_final_message=flag)
        rendered.append(chat_template(given_messages, variables=variables))

    refusal = refusal_of(InvalidRequest, render)
    if refusal is not None:
        assert refusal.param
        assert len(str(refusal)) < 2000
        return
    special = sum(segment.is_special for segment in rendered[0].segments)
    assert special == 2 * len(given_messages) + (0 if flag else 1) - (1 if flag else 0)


@FUZZ
@given(st.text(max_size=60) | templates())
def test_any_source_makes_a_template_or_a_configuration_error(source: str) -> None:
    error = refusal_of(ConfigurationError, lambda: ChatTemplate(TemplateSource(source), CONTROL, LIMITS))
    assert error is None or "chat template" in str(error)
