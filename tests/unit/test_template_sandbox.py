"""A chat template is foreign code: it reaches nothing of Python, and ends soon and small whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest
from shared.tokenizer.sandbox import (
    RenderLimits,
    TemplateRefusal,
    TemplateTooCostly,
    compile_template,
    render_bounded,
)
from shared.tokenizer.template import ChatTemplate, TemplateSource

LIMITS = RenderLimits(max_chars=10_000, max_seconds=0.3)
_GROW = "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = GROWN %}{% endfor %}"
_NESTED = _GROW.replace("GROWN", "[ns.x, ns.x]")


def render(text: str, **variables: object) -> str:
    return render_bounded(compile_template(text), variables, LIMITS)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 'a' * 9999 * 9999 }}",
        "{% for i in range(99999) %}xxxxxxxxxx{% endfor %}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999) | replace('', 'bb') }}",
        "{{ range(9999) | list | join('aaaaaaaaaaaaaaaaaaaaaa') }}",
        "{{ ('a' * 9999).join(['b'] * 9999) }}",
        "{{ ('\\n' * 9999) | indent(9) }}",
        _GROW.replace("GROWN", "ns.x + ns.x"),
        _GROW.replace("GROWN", "ns.x ~ ns.x"),
        _GROW.replace("GROWN", "'%s%s' % (ns.x, ns.x)"),
        _NESTED + "{{ ns.x }}",
        _NESTED + "{{ ns.x ~ '' }}",
        _NESTED + "{{ ns.x | string }}",
        _NESTED + "{{ ns.x | upper }}",
        _NESTED + "{{ ns.x | tojson }}",
        _NESTED + "{{ ns.x | join }}",
        _NESTED + "{{ ''.join(ns.x) }}",
        _NESTED + "{{ ns.x | replace('a', 'b') }}",
        _NESTED + "{{ '%s' % (ns.x,) }}",
        _NESTED + "{{ ns.x | map('string') | list }}",
    ],
)
def test_no_value_grows_beyond_the_limit(text: str) -> None:
    with pytest.raises(TemplateTooCostly, match="more than 10000 characters"):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% for j in 'ab' * 4999 %}{% set x = i %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_only_computes_is_stopped_in_time(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateTooCostly, match="time limit"):
        render(text)
    assert time.perf_counter() - start < LIMITS.max_seconds + 2.0


@pytest.mark.parametrize("text", ["{{ 2 ** 99999999 }}", "{% set x = 2 ** 4000 %}{{ x * x }}"])
def test_numbers_stay_small(text: str) -> None:
    with pytest.raises(TemplateTooCostly, match="numbers"):
        render(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", OverflowError),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RecursionError),
        ("{{ '%999999999d' % 1 }}", SecurityError),
        ("{{ '%*d' % (999999999, 1) }}", SecurityError),
        ("{{ '{:999999999}'.format(1) }}", SecurityError),
        ("{{ '{x:999999999}'.format_map({'x': 1}) }}", SecurityError),
        ("{{ 'a'.ljust(10**9) }}", SecurityError),
        ("{{ 'a'.zfill(10**9) }}", SecurityError),
        ("{{ '\t'.expandtabs(10**9) }}", SecurityError),
        ("{{ 'a' | indent(10**9) }}", SecurityError),
        ("{{ [1] | tojson(indent=10**9) }}", SecurityError),
    ],
)
def test_widths_and_ranges_are_bounded(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0] }}",
        "{{ messages['__class__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('{0.__class__}' | string).format(1) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ['{0.__class__}'] | map('format', 1) | list }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ cycler }}{{ lipsum() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{{ open('/etc/passwd') }}",
        "{{ 'a' | attr('upper') }}",
        "{{ 'a' | format }}",
    ],
)
def test_attacks_on_the_sandbox_reach_nothing(text: str) -> None:
    chat: list[dict[str, object]] = [{"role": "user", "content": "x"}]
    try:
        shown = render(text, messages=chat)
    except (TemplateError, TypeError, AttributeError):
        shown = ""
    assert shown == ""
    assert chat == [{"role": "user", "content": "x"}]


def test_the_budget_cannot_be_reached_or_replaced() -> None:
    assert render("{{ slipstream_budget }}{{ budget }}") == ""
    with pytest.raises(TemplateTooCostly):
        render("{% set budget = 1 %}{% set slipstream_budget = 2 %}{{ 'a' * 10001 }}")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{% for x in y recursive %}{% endfor %}", TemplateSyntaxError),
        ("{{ x | slipstream_each }}", TemplateError),
        ("{% for %}", TemplateSyntaxError),
        ("{% break %}", SyntaxError),
    ],
)
def test_what_does_not_compile(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        compile_template(text)


def test_compiling_does_not_compute_what_rendering_would_refuse() -> None:
    start = time.perf_counter()
    compile_template("{{ 'a' * 10**10 }}{{ 2 ** 10**9 }}{{ 'a' * 10**9 ~ 'b' * 10**9 }}")
    assert time.perf_counter() - start < 2.0


ORDINARY = [
    "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for m in messages if m.a > 1 %}{{ m.a }}{% else %}none{% endfor %}",
    "{% for k, v in messages[0] | dictsort %}{{ k ~ '=' ~ v ~ ';' }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% endfor %}",
    "{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}"
    "{% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro row(x, y=2) %}<{{ x }}|{{ y }}>{% endmacro %}{{ row(1) }}{{ row(3, y=4) }}",
    "  {% if messages %}\n  yes\n  {% endif %}\nlast",
    "{{ 'a,b'.split(',') | join('-') }}{{ ' x '.strip() }}{{ 'x'.upper() }}{{ 'abc'[1:] }}{{ 'ab'.startswith('a') }}",
    "{{ messages | map(attribute='a') | list }}{{ messages | selectattr('a', 'equalto', 1) | list | length }}",
    "{{ '%s is %d, %.2f' % ('x', 3, 1.5) }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 3 }}{{ [1] + [2] }}",
    "{{ none }}{{ undefined_name }}{{ missing is defined }}{{ x | default('d') }}{{ '3' | int + 1 }}",
    "{{ 'line\nline' | indent(2) }}{{ 'a-b' | replace('-', '+') }}{{ 'hi' | title | trim }}{{ [3, 1] | sort | first }}",
    "{% filter upper %}text{% endfilter %}{% set block %}inner{% endset %}{{ block }}{{ dict(a=1).a }}",
    "{{ range(3) | list }}{{ ['b', 'a', 'b'] | unique | join }}{{ 'a' in 'abc' }}{{ messages[-1].a }}",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_templates_render_as_in_plain_jinja(text: str) -> None:
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    ).from_string(text)
    messages = [{"a": 1}, {"a": 2}]
    assert render(text, messages=messages) == plain.render(messages=messages)


def test_tojson_keeps_html_and_can_escape_beyond_ascii() -> None:
    assert render("{{ v | tojson }}", v={"b": "<é🧪>", "a": [1, None]}) == '{"b": "<é🧪>", "a": [1, null]}'
    assert render("{{ v | tojson(ensure_ascii=true) }}", v="é🧪\ud800") == '"\\u00e9\\ud83e\\uddea\ud800"'
    assert render("{{ v | tojson(indent=1, sort_keys=true) }}", v={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ v | tojson(separators=(',', ':')) }}", v=[1, {"a": 2}]) == '[1,{"a":2}]'


def test_training_marks_are_transparent() -> None:
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"


def test_a_template_can_refuse_and_tell_the_date() -> None:
    with pytest.raises(TemplateRefusal, match=r"^no system role$"):
        render("{{ raise_exception('no system role') }}")
    assert render("{{ strftime_now('%Y') }}") >= "2024"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ 'a' * 10**9 }}", "more than 10000 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time limit"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_through_a_chat_each_of_them_is_a_refused_request(text: str, said: str) -> None:
    chat = ChatTemplate(TemplateSource(text), (), LIMITS)
    with pytest.raises(InvalidRequest, match=said) as caught:
        chat.render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_one_render_leaves_nothing_for_the_next() -> None:
    template = compile_template("{% set ns = namespace(n=0) %}{{ 'a' * n }}")
    calls: list[Callable[[], str]] = [lambda n=n: render_bounded(template, {"n": n}, LIMITS) for n in (9000, 9000, 5)]  # type: ignore[misc]
    assert [len(call()) for call in calls] == [9000, 9000, 5]
