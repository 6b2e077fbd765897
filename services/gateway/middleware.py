"""What every request passes: a request id, the key check, and errors in one shape."""

from __future__ import annotations

import re
import uuid

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from services.gateway.auth import KeyRing
from services.gateway.errors import ApiError, GenerationFailed, to_api_error
from services.gateway.metrics import GatewayMetrics
from services.gateway.sse import STREAM_KEY
from shared.errors import CapacityError

KEY_ID = web.RequestKey("key_id", str)
ANSWER_HEADERS = web.RequestKey("answer_headers", dict)
"""Headers of whatever answers the request, errors included, as soon as a route knows them."""
OPEN_ROUTES = frozenset({"/live", "/health"})

_REQUEST_ID = web.RequestKey("request_id", str)
_HEADER = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_log = structlog.get_logger()


def request_id_of(request: web.Request) -> str:
    """The id for logs and the response header: the client's when it is harmless, else our own."""
    known = request.get(_REQUEST_ID)
    if known is None:
        given = request.headers.get(_HEADER, "")
        known = request[_REQUEST_ID] = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
    return known


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """`on_response_prepare`: streams and WebSockets get the header too."""
    response.headers[_HEADER] = request_id_of(request)
    response.headers.update(request.get(ANSWER_HEADERS, {}))


def make_error_middleware(metrics: GatewayMetrics) -> Middleware:
    """Outermost: turns every exception into an error body and counts the response."""

    @web.middleware
    async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except ConnectionError:
            raise
        except Exception as exc:
            response = _answer(request, exc)
        metrics.responses.labels(_route(request), str(response.status)).inc()
        return response

    return errors


def make_auth_middleware(keys: KeyRing) -> Middleware:
    """Guards every route, unknown ones included, except liveness and readiness."""

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_ROUTES:
            request[KEY_ID] = keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return auth


def _answer(request: web.Request, exc: Exception) -> web.StreamResponse:
    error = to_api_error(exc)
    _log_error(request, exc, error)
    started = request.get(STREAM_KEY)
    return started if started is not None else error.response()


def _log_error(request: web.Request, exc: Exception, error: ApiError) -> None:
    log = _log.bind(request_id=request_id_of(request), route=_route(request), status=error.status, code=error.code)
    if isinstance(exc, GenerationFailed):
        log.error("request_failed", detail=exc.detail)
    elif error.status < 500 or isinstance(exc, CapacityError | web.HTTPException):
        log.info("request_refused")
    else:
        log.error("request_failed", exc_info=exc)


def _route(request: web.Request) -> str:
    """The route's pattern, never the raw path, so that clients cannot invent label values."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
