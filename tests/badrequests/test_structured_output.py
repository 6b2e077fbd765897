"""Bad requests, rows 64 to 71: response formats, grammars and tools, which are all refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.badrequests.cases import Case, chat, check_accepted, check_refused, each_value, parametrize
from tests.gateway_rig import Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNSUPPORTED = "unsupported_parameter"


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "zebra", "schema": value}}


def bomb(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"anyOf": [value, {"type": "array", "maxItems": 10**9}]}
    return value


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


REFUSED = [
    *each_value(64, "response_format", [{"type": "json_schema"}, {"type": "zebra"}, {}, "json", 7], UNSUPPORTED),
    *each_value(64, "response_format", [{"type": "json_object"}, {"type": "text", "more": 1}], UNSUPPORTED),
    *each_value(65, "response_format", [schema("zebra"), schema([]), schema({"$ref": "#"})], UNSUPPORTED),
    *each_value(65, "response_format", [schema({"$ref": "http://169.254.169.254/schema"})], UNSUPPORTED),
    *each_value(66, "response_format", [schema(bomb(200)), schema({"maxItems": 10**9})], UNSUPPORTED),
    *each_value(66, "guided_json", [bomb(200), "zebra"], UNSUPPORTED),
    *each_value(67, "guided_regex", ["(a+)+$", "a{1,1000000000}"], UNSUPPORTED),
    *each_value(67, "guided_grammar", ["root ::= root root"], UNSUPPORTED),
    *each_value(67, "guided_choice", [["yes", "no"]], UNSUPPORTED),
    Case(
        *(68, "two constraints", chat(guided_regex="a", guided_json={})),
        *(400, UNSUPPORTED, "guided_json"),
    ),
    *each_value(68, "structured_outputs", [{"regex": "a", "json": {}}], UNSUPPORTED),
    *each_value(69, "tools", [[], [tool()], [tool(name="a b")], [tool(name="x", parameters="zebra")]], UNSUPPORTED),
    *each_value(69, "tools", [[tool(name="x", parameters={"pattern": "(a+)+$"})], "zebra"], UNSUPPORTED),
    *each_value(69, "functions", [[], [{"name": "zebra"}]], UNSUPPORTED),
    *each_value(70, "tool_choice", ["auto", "required", 7, tool(name="zebra")], UNSUPPORTED),
    *each_value(70, "function_call", ["auto", {"name": "zebra"}], UNSUPPORTED),
    *each_value(71, "tools", [[tool(name=f"zebra{i}") for i in range(10_000)]], UNSUPPORTED),
]

ACCEPTED = [
    Case(64, "plain text as format", chat(response_format={"type": "text"})),
    Case(70, "no tool choice", chat(tool_choice="none", parallel_tool_calls=True, tools=None)),
]


@parametrize(REFUSED)
async def test_refused(it: Rig, case: Case) -> None:
    await check_refused(it, case)


@parametrize(ACCEPTED)
async def test_accepted(it: Rig, case: Case) -> None:
    await check_accepted(it, case)
