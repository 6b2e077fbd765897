"""The kept OpenAPI file, and the few questions that tests ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).resolve().parents[1] / "docs" / "openapi.yaml"
METHODS = frozenset({"get", "post", "put", "patch", "delete"})


def load() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of each."""
    for path, item in document["paths"].items():
        for method in METHODS & item.keys():
            yield method.upper(), path, item[method]


def examples(document: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(method, path, body) of every example of a request."""
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
                yield method, path, example["value"]


def resolve(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """What a local reference points to; anything else as it is."""
    while "$ref" in node:
        target: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def properties(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """All properties of a schema, those of its parts included."""
    node = resolve(document, node)
    found: dict[str, Any] = dict(node.get("properties", {}))
    for part in node.get("allOf", []):
        found |= properties(document, part)
    return found


def error_codes(document: dict[str, Any]) -> set[tuple[int, str]]:
    """(status, code) of every error that some operation answers."""
    found = set()
    for _, _, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                schema = resolve(document, answer)["content"]["application/json"]["schema"]
                found |= {(int(status), code) for code in _codes(document, schema)}
    return found


def _codes(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    code = properties(document, schema).get("error", {}).get("properties", {}).get("code", {})
    return [code["const"]] if "const" in code else [*code.get("enum", []), *code.get("examples", [])]
