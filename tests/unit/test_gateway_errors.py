"""Every exception has one status, type and code, and shows nothing it should not."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from services.gateway import errors
from services.gateway.errors import GenerationFailed, to_api_error
from shared.errors import (
    BusUnavailable,
    ConfigurationError,
    ContextLengthExceeded,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    Overloaded,
    ProtocolError,
    RequestTooLarge,
)
from shared.protocol.messages import End


@pytest.mark.parametrize(
    ("exc", "status", "kind", "code"),
    [
        (InvalidRequest("x", "n"), 400, "invalid_request_error", "invalid_value"),
        (InvalidRequest("x", None, "invalid_json"), 400, "invalid_request_error", "invalid_json"),
        (ContextLengthExceeded("x", "prompt"), 400, "invalid_request_error", "context_length_exceeded"),
        (InvalidApiKey("x"), 401, "authentication_error", "invalid_api_key"),
        (errors.OriginRefused("x"), 403, "permission_error", "origin_not_allowed"),
        (ModelNotFound("x", "model"), 404, "not_found_error", "model_not_found"),
        (errors.RouteNotFound("x"), 404, "not_found_error", "not_found"),
        (errors.MethodNotAllowed("x", frozenset({"POST"})), 405, "invalid_request_error", "method_not_allowed"),
        (errors.RequestTimeout("x"), 408, "invalid_request_error", "request_timeout"),
        (RequestTooLarge("x"), 413, "invalid_request_error", "request_too_large"),
        (errors.UnsupportedEncoding("x"), 415, "invalid_request_error", "unsupported_media_type"),
        (errors.RateLimited("x"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (Overloaded("x"), 503, "server_error", "overloaded"),
        (NoWorkers("x"), 503, "server_error", "no_workers"),
        (BusUnavailable("x"), 503, "server_error", "bus_unavailable"),
        (errors.Draining("x"), 503, "server_error", "draining"),
        (GenerationFailed(End("error", "engine_error")), 500, "server_error", "engine_error"),
        (GenerationFailed(End("error", "deadline_exceeded")), 504, "server_error", "deadline_exceeded"),
        (GenerationFailed(End("error", "bus_unavailable")), 503, "server_error", "bus_unavailable"),
        (GenerationFailed(End("cancelled", "")), 500, "server_error", "request_cancelled"),
        (web.HTTPNotFound(), 404, "not_found_error", "not_found"),
        (web.HTTPMethodNotAllowed("GET", ["POST"]), 405, "invalid_request_error", "method_not_allowed"),
        (web.HTTPRequestEntityTooLarge(1, 2), 413, "invalid_request_error", "request_too_large"),
        (web.HTTPExpectationFailed(), 417, "invalid_request_error", "expectation_failed"),
        (ProtocolError("secret detail"), 500, "server_error", "internal_error"),
        (ConfigurationError("secret detail"), 500, "server_error", "internal_error"),
        (RuntimeError("secret detail"), 500, "server_error", "internal_error"),
    ],
)
def test_status_type_and_code(exc: Exception, status: int, kind: str, code: str) -> None:
    error = to_api_error(exc)
    assert (error.status, error.type, error.code) == (status, kind, code)
    body = json.loads(error.body())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in body["error"]["message"]


def test_headers_tell_the_client_what_to_do() -> None:
    assert to_api_error(InvalidApiKey("x")).headers["WWW-Authenticate"] == "Bearer"
    assert to_api_error(web.HTTPMethodNotAllowed("GET", ["POST", "OPTIONS"])).headers["Allow"] == "OPTIONS, POST"
    assert to_api_error(Overloaded("x", retry_after=3)).headers["Retry-After"] == "3"
    assert to_api_error(errors.Draining("x")).headers["Connection"] == "close"
    quarantined = to_api_error(GenerationFailed(End("error", "request_quarantined")))
    assert quarantined.headers["x-should-retry"] == "false"
    assert "x-should-retry" not in to_api_error(GenerationFailed(End("error", "engine_error"))).headers


def test_the_journals_own_words_are_not_passed_on() -> None:
    end = End("error", "engine_error", "device 0x7f2 ran out at /opt/x")
    assert "0x7f2" not in to_api_error(GenerationFailed(end)).message


def test_the_param_is_kept_in_the_clients_words() -> None:
    body = json.loads(to_api_error(InvalidRequest("x", "messages[0].role")).body())
    assert body["error"]["param"] == "messages[0].role"
