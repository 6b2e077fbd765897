"""docs/openapi.yaml against the code and docs/api.md: the same routes, fields, bounds and error codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from services.gateway.fields import RESERVED_TEMPLATE_KWARGS, STREAM_OPTIONS
from services.gateway.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, validate
from shared.errors import InvalidRequest
from shared.protocol.messages import Usage
from tests import openapi_schema
from tests.unit.test_docs import documented_errors, routes

DOCUMENT = openapi_schema.load()
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
BODIES: dict[str, type[Body]] = {
    "ChatRequest": ChatBody,
    "CompletionRequest": CompletionBody,
    "TokenizeRequest": TokenizeBody,
    "DetokenizeRequest": DetokenizeBody,
}
NEEDED: dict[str, dict[str, Any]] = {
    "ChatRequest": {"messages": [{"role": "user", "content": "hi"}]},
    "CompletionRequest": {"prompt": "hi"},
    "TokenizeRequest": {"prompt": "hi"},
    "DetokenizeRequest": {"tokens": [1]},
}
COMPANIONS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "max_tokens": {"echo": True},
}
"""What a field needs beside it to be accepted."""
UNTESTED = {"best_of"}
"""Bounds that another rule hides: best_of has to equal n."""


def fields(name: str) -> dict[str, Any]:
    found = openapi_schema.properties(DOCUMENT, SCHEMAS[name])
    return {field: openapi_schema.resolve(DOCUMENT, schema) for field, schema in found.items()}


def edges() -> Iterator[Any]:
    """(body, field, value, whether it is within the bounds), from the numbers in the file."""
    for name in BODIES:
        for field, schema in fields(name).items():
            if field in UNTESTED:
                continue
            for value, fits in (*_numbers(schema), *_lengths(schema)):
                yield pytest.param(name, field, value, fits, id=f"{name}.{field} {_shown(value)} {fits}")


def _numbers(schema: dict[str, Any]) -> Iterator[tuple[float, bool]]:
    step = 1 if "integer" in schema.get("type", ()) else 0.001
    for bound, direction in (("minimum", -1), ("maximum", 1)):
        if bound in schema:
            yield schema[bound], True
            yield schema[bound] + direction * step, False
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"], False
        yield schema["exclusiveMinimum"] + 0.001, True


def _lengths(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    for part in (schema, *schema.get("anyOf", [])):
        if "maxLength" in part:
            yield "x" * part["maxLength"], True
            yield "x" * (part["maxLength"] + 1), False
        if "minLength" in part:
            yield "x" * (part["minLength"] - 1), False
        if "maxProperties" in part:
            yield {str(index): 0 for index in range(part["maxProperties"])}, True
            yield {str(index): 0 for index in range(part["maxProperties"] + 1)}, False
    if "maxItems" in schema:
        yield [1] * schema["maxItems"], True
        yield [1] * (schema["maxItems"] + 1), False


def _shown(value: Any) -> str:
    return json.dumps(value)[:24]


def refused_field(name: str, body: dict[str, Any]) -> str | None:
    try:
        validate(BODIES[name], body)
    except InvalidRequest as exc:
        return exc.param
    return None


def test_the_routes_are_the_gateways() -> None:
    assert {(method, path) for method, path, _ in openapi_schema.operations(DOCUMENT)} == routes()


@pytest.mark.parametrize("name", BODIES)
def test_the_fields_of_a_body_are_the_schemas(name: str) -> None:
    assert fields(name).keys() == BODIES[name].model_fields.keys()


@pytest.mark.parametrize("name", BODIES)
def test_every_field_but_the_needed_ones_may_be_null(name: str) -> None:
    required = set(NEEDED[name]) - ({"prompt"} if name == "TokenizeRequest" else set())
    for field, schema in fields(name).items():
        parts = (schema, *schema.get("anyOf", []))
        nullable = any("null" in part.get("type", ()) or None in part.get("enum", ()) for part in parts)
        assert nullable == (field not in required), field
        if nullable:
            assert refused_field(name, {**NEEDED[name], field: None}) in (None, "prompt")


@pytest.mark.parametrize(("name", "field", "value", "fits"), list(edges()))
def test_the_bounds_of_a_field_are_the_schemas(name: str, field: str, value: Any, fits: bool) -> None:
    companions = {key: one for key, one in COMPANIONS.get(field, {}).items() if key in BODIES[name].model_fields}
    if (name, field) == ("ChatRequest", "max_tokens"):
        fits, companions = 0 < value < 2**31, {}  # no tokens are for scoring a prompt, which chats cannot ask for
    refused = refused_field(name, {**NEEDED[name], **companions, field: value})
    assert refused == (None if fits else field)


def test_there_are_bounds_to_check() -> None:
    cases = list(edges())
    assert len(cases) > 80
    assert {"temperature", "n", "seed", "stop", "logit_bias", "timeout"} <= {case.values[1] for case in cases}


def test_the_error_codes_are_those_of_the_documentation() -> None:
    found = openapi_schema.error_codes(DOCUMENT)
    assert found == documented_errors()


def test_lists_of_names_are_complete() -> None:
    options = fields("ChatRequest")["stream_options"]
    assert set(options["properties"]) == STREAM_OPTIONS
    assert set(SCHEMAS["TemplateVariables"]["propertyNames"]["not"]["enum"]) >= RESERVED_TEMPLATE_KWARGS
    assert set(SCHEMAS["Usage"]["properties"]["slipstream"]["properties"]) == set(Usage.__slots__)


def test_every_example_is_accepted() -> None:
    bodies = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest"}
    names = {**bodies, "/tokenize": "TokenizeRequest", "/detokenize": "DetokenizeRequest"}
    found = list(openapi_schema.examples(DOCUMENT))
    assert {path for _, path, _ in found} == names.keys()
    for _, path, body in found:
        assert refused_field(names[path], body) is None


def test_every_answer_carries_the_request_id() -> None:
    for method, path, operation in openapi_schema.operations(DOCUMENT):
        for status, answer in operation["responses"].items():
            if status != "101":
                assert "x-request-id" in openapi_schema.resolve(DOCUMENT, answer)["headers"], (method, path, status)
