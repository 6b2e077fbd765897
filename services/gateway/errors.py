"""From an exception to what the client sees: status, OpenAI error body and headers.

The only place that knows HTTP statuses. A message written by us for the caller is passed on; the
text of an unexpected exception goes to the log under the request id and never to the client.

    exception                      status  type                   code
    InvalidRequest, ...            400     invalid_request_error  the exception's
    InvalidApiKey                  401     authentication_error   invalid_api_key
    ModelNotFound, RouteNotFound   404     not_found_error        model_not_found, not_found
    StreamNotFound                 404     not_found_error        stream_not_found
    MethodNotAllowed               405     invalid_request_error  method_not_allowed
    RequestTimeout                 408     invalid_request_error  request_timeout
    ResumePositionLost             409     invalid_request_error  resume_position_lost
    RequestTooLarge                413     invalid_request_error  request_too_large
    UnsupportedEncoding            415     invalid_request_error  unsupported_media_type
    IdempotencyKeyReused           422     invalid_request_error  idempotency_key_reused
    RateLimited                    429     rate_limit_error       rate_limit_exceeded
    Overloaded, NoWorkers, ...     503     server_error           the exception's
    DeadlineExceeded               504     server_error           deadline_exceeded
    GenerationFailed               500,503,504 server_error       the journal's
    anything else                  500     server_error           internal_error
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from shared.errors import (
    CapacityError,
    InternalError,
    InvalidApiKey,
    ModelNotFound,
    RequestError,
    RequestTooLarge,
)
from shared.protocol.messages import OUTCOME_CANCELLED, End

RESUME_AFTER_MS = 1000

_DEADLINE_CODE = "deadline_exceeded"
_QUARANTINE_CODE = "request_quarantined"

_TOO_LONG_CODE = "context_length_exceeded"
_RESUMABLE = frozenset({"draining", "bus_unavailable", "gateway_stopped"})
"""The gateway could not follow the request to its end, but the request goes on."""
_END_STATUS = {_TOO_LONG_CODE: 400, _DEADLINE_CODE: 504, **dict.fromkeys(_RESUMABLE, 503)}
_END_MESSAGES = {
    _DEADLINE_CODE: "The request did not end within the time allowed for it. Ask for fewer tokens or try again later.",
    _TOO_LONG_CODE: "This model's maximum context length is too short for the prompt on the workers that are live now.",
    _QUARANTINE_CODE: "The request was stopped because workers died while they handled it. Do not send it again.",
    "request_cancelled": "The request was cancelled.",
    "draining": "This gateway is shutting down; the request goes on for a while and can be resumed at another gateway.",
}


class RouteNotFound(RequestError):
    code = "not_found"


class MethodNotAllowed(RequestError):
    """`allowed` holds the methods for the Allow header."""

    code = "method_not_allowed"

    def __init__(self, message: str, allowed: frozenset[str]) -> None:
        super().__init__(message)
        self.allowed = allowed


class UnsupportedEncoding(RequestError):
    code = "unsupported_media_type"


class RequestTimeout(RequestError):
    code = "request_timeout"


class OriginRefused(RequestError):
    code = "origin_not_allowed"


class StreamNotFound(RequestError):
    code = "stream_not_found"


class ResumePositionLost(RequestError):
    code = "resume_position_lost"


class IdempotencyKeyReused(RequestError):
    code = "idempotency_key_reused"


class RateLimited(CapacityError):
    code = "rate_limit_exceeded"


class Draining(CapacityError):
    code = "draining"


class DeadlineExceeded(CapacityError):
    """The client's own `timeout` was over before there was room for the request."""

    code = _DEADLINE_CODE


class GenerationFailed(InternalError):
    """A request ended in the journal without finishing; retrying it is pointless unless `may_retry`.

    `detail` is the journal's own message, for the log only. `may_resume`: another gateway may know how it goes on.
    """

    def __init__(self, end: End) -> None:
        code = "request_cancelled" if end.outcome == OUTCOME_CANCELLED else end.code or "internal_error"
        super().__init__(_END_MESSAGES.get(code, "The request failed while it was computed."))
        self.code = code
        self.detail = end.message or end.code
        self.status = _END_STATUS.get(code, 500)
        self.may_resume = code in _RESUMABLE
        self.may_retry = code not in (_DEADLINE_CODE, _QUARANTINE_CODE, _TOO_LONG_CODE)


@dataclass(frozen=True, slots=True)
class ApiError:
    """One error as the client gets it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def response(self) -> web.Response:
        return web.Response(
            status=self.status, body=self.body(), content_type="application/json", headers=dict(self.headers)
        )


_REQUEST_STATUS: dict[type[RequestError], tuple[int, str]] = {
    InvalidApiKey: (401, "authentication_error"),
    OriginRefused: (403, "permission_error"),
    ModelNotFound: (404, "not_found_error"),
    RouteNotFound: (404, "not_found_error"),
    StreamNotFound: (404, "not_found_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    RequestTimeout: (408, "invalid_request_error"),
    ResumePositionLost: (409, "invalid_request_error"),
    RequestTooLarge: (413, "invalid_request_error"),
    UnsupportedEncoding: (415, "invalid_request_error"),
    IdempotencyKeyReused: (422, "invalid_request_error"),
}
_CAPACITY_STATUS: dict[type[CapacityError], tuple[int, str]] = {
    RateLimited: (429, "rate_limit_error"),
    DeadlineExceeded: (504, "server_error"),
}


def to_api_error(exc: BaseException) -> ApiError:
    """The client's view of `exc`; never raises."""
    if isinstance(exc, RequestError):
        status, kind = _REQUEST_STATUS.get(type(exc), (400, "invalid_request_error"))
        return ApiError(status, kind, exc.code, str(exc), exc.param, _request_headers(exc))
    if isinstance(exc, CapacityError):
        status, kind = _CAPACITY_STATUS.get(type(exc), (503, "server_error"))
        headers = {"Retry-After": str(max(1, exc.retry_after))}
        if isinstance(exc, DeadlineExceeded):
            headers = {"x-should-retry": "false"}
        if isinstance(exc, Draining):
            headers["Connection"] = "close"
        return ApiError(status, kind, exc.code, str(exc), None, headers)
    if isinstance(exc, GenerationFailed):
        headers = {} if exc.may_retry else {"x-should-retry": "false"}
        if exc.status == 503:
            headers["Retry-After"] = "2"
        kind = "server_error" if exc.status >= 500 else "invalid_request_error"
        return ApiError(exc.status, kind, exc.code, str(exc), None, headers)
    if isinstance(exc, web.HTTPException):
        return _framework_error(exc)
    return ApiError(500, "server_error", "internal_error", "The server failed; the request id finds it in the log.")


def _request_headers(exc: RequestError) -> dict[str, str]:
    if isinstance(exc, InvalidApiKey):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(exc, MethodNotAllowed):
        return {"Allow": ", ".join(sorted(exc.allowed))}
    if isinstance(exc, ResumePositionLost):
        return {"x-should-retry": "false"}
    return {}


def _framework_error(exc: web.HTTPException) -> ApiError:
    """Errors raised by aiohttp itself: unknown route, wrong method, body over the limit."""
    if isinstance(exc, web.HTTPMethodNotAllowed):
        message = f"This method is not allowed here; use {', '.join(sorted(exc.allowed_methods))}."
        return to_api_error(MethodNotAllowed(message, frozenset(exc.allowed_methods)))
    if isinstance(exc, web.HTTPNotFound):
        return to_api_error(RouteNotFound("There is no such route; GET /v1/models shows that the server is there."))
    if isinstance(exc, web.HTTPRequestEntityTooLarge):
        return to_api_error(RequestTooLarge("The request body is over the size limit; send a shorter one."))
    kind = "invalid_request_error" if exc.status < 500 else "server_error"
    return ApiError(exc.status, kind, exc.reason.lower().replace(" ", "_"), f"{exc.reason}.")


def error_event(exc: BaseException, last_event_id: str) -> dict[str, Any]:
    """The error object of a stream that fails after it began: how far the client came, and whether to resume.

    `resume`: the same generation may be read on, at another gateway. Without it, a retry is a new request.
    """
    api = to_api_error(exc)
    resume = isinstance(exc, GenerationFailed) and exc.may_resume
    error = {"message": api.message, "type": api.type, "param": api.param, "code": api.code}
    return {
        "error": {**error, "last_event_id": last_event_id, "retry": {"resume": resume, "after_ms": RESUME_AFTER_MS}}
    }
