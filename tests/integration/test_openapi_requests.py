"""Requests made up by schemathesis from docs/openapi.yaml: no answer is a server's error, and each is as the file says.

`OPENAPI_EXAMPLES=500 pytest tests/integration/test_openapi_requests.py` makes up more of them than a usual run.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests import openapi_schema
from tests.gateway_rig import MODEL, Rig, rig

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "12"))
START_TIMEOUT_S = 30
SCHEMA = schemathesis.openapi.from_dict(openapi_schema.load())
OPERATIONS: dict[str, APIOperation[Any, Any, Any, Any]] = {
    found.label: found for found in (result.ok() for result in SCHEMA.get_all_operations() if isinstance(result, Ok))
}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
WITH_BODY = [label for label in OPERATIONS if label.startswith("POST")]


@contextmanager
def running(redis_url: str) -> Iterator[Rig]:
    """A gateway with a loop and a thread of its own, for clients that block."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, Rig]] = Future()

    async def serve() -> None:
        done = asyncio.Event()
        try:
            async with rig(redis_url, f"openapi-{secrets.token_hex(6)}") as one:
                ready.set_result((asyncio.get_running_loop(), done, one))
                await done.wait()
        except BaseException as exc:
            if not ready.done():
                ready.set_exception(exc)
            raise

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="gateway")
    thread.start()
    loop, done, one = ready.result(START_TIMEOUT_S)
    try:
        yield one
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(START_TIMEOUT_S)


@pytest.fixture(scope="module")
def gateway(redis_url: str) -> Iterator[Rig]:
    with running(redis_url) as one:
        yield one


def check(gateway: Rig, label: str, mode: GenerationMode, extra: list[Any]) -> None:
    """Send made-up requests of one operation; deterministic, as derandomize says."""
    with requests.Session() as session:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
        def run(case: schemathesis.Case[Any]) -> None:
            response = case.call(base_url=gateway.url, session=session, timeout=30)
            case.validate_response(response, checks=[*CHECKS, *extra])

        run()


@pytest.mark.parametrize("label", OPERATIONS)
def test_requests_as_the_file_describes_them(gateway: Rig, label: str) -> None:
    check(gateway, label, GenerationMode.POSITIVE, [])


@pytest.mark.parametrize("label", WITH_BODY)
def test_requests_the_file_forbids_are_refused(gateway: Rig, label: str) -> None:
    check(gateway, label, GenerationMode.NEGATIVE, [checks.negative_data_rejection])


def test_the_examples_of_the_file_are_answered(gateway: Rig) -> None:
    answered = 0
    for method, path, body in openapi_schema.examples(openapi_schema.load()):
        response = requests.request(method, gateway.url + path, json=body, timeout=30)
        assert response.status_code == 200, response.text
        OPERATIONS[f"{method} {path}"].validate_response(response)
        answered += 1
    assert answered >= 8
    assert requests.get(f"{gateway.url}/v1/models/{MODEL}", timeout=30).status_code == 200
