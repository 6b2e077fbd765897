"""Finding the answer that a client wants to read on, and the place it has come to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiohttp import web

from services.gateway.errors import ResumePositionLost, StreamNotFound
from services.gateway.gateway import Gateway
from services.gateway.presentation import Presentation
from shared.bus.stored import MAX_REQUESTS, StoredResponse
from shared.errors import InvalidRequest, ProtocolError
from shared.protocol.position import Position, Standing

LAST_EVENT_ID = "Last-Event-ID"
STARTING_AFTER = "starting_after"

_RESPONSE_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True)
class Place:
    """An event id a client gave, "" for the beginning, and what it is called in the request."""

    event_id: str
    param: str


@dataclass(frozen=True, slots=True)
class Found:
    """A stored answer, how it is shown, and what the client has of it: one position a job, none at the beginning."""

    stored: StoredResponse
    shown: Presentation
    after: tuple[Position, ...]


def place_of(request: web.Request) -> Place:
    """Where a request wants to go on from.

    The header wins, because browsers send it when they connect again, with the URL as it was.
    """
    if LAST_EVENT_ID in request.headers:
        return Place(request.headers[LAST_EVENT_ID], LAST_EVENT_ID)
    return Place(request.query.get(STARTING_AFTER, ""), STARTING_AFTER)


def positions_of(place: Place) -> tuple[Position, ...]:
    """The positions in an event id. Raises InvalidRequest."""
    if not place.event_id:
        return ()
    parts = place.event_id.split(",", MAX_REQUESTS)
    try:
        if len(parts) > MAX_REQUESTS:
            raise ProtocolError("too many positions")
        return tuple(map(Position.parse, parts))
    except ProtocolError:
        raise InvalidRequest(f"{place.param} must be the id of an event of this stream.", place.param) from None


class StoredAnswers:
    """Answers that can be read on, for the clients they belong to."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def find(self, response_id: str, key_id: str) -> StoredResponse:
        """Raises StreamNotFound, also for what belongs to another key, and BusUnavailable."""
        stored = await self._gateway.responses.load(response_id) if _RESPONSE_ID.fullmatch(response_id) else None
        if stored is None or stored.key_id != key_id:
            raise StreamNotFound("This stream is not known here, or not any more.")
        return stored

    async def locate(self, response_id: str, key_id: str, place: Place) -> Found:
        """An answer and the place in it; counted by outcome. Raises RequestError and BusUnavailable."""
        after = positions_of(place)
        resumes = self._gateway.metrics.resumes
        try:
            stored = await self.find(response_id, key_id)
            await self._check(stored, after, place.param)
        except StreamNotFound:
            resumes.labels("not_found").inc()
            raise
        except ResumePositionLost:
            resumes.labels("lost").inc()
            raise
        resumes.labels("resumed").inc()
        return Found(stored, Presentation.unpack(stored.presentation), after)

    async def _check(self, stored: StoredResponse, after: tuple[Position, ...], param: str) -> None:
        """Raises RequestError when a client cannot go on from `after`."""
        count, n = len(stored.request_ids), Presentation.unpack(stored.presentation).n
        if after and len(after) != count:
            raise InvalidRequest(f"{param} must have {count} positions, one a prompt.", param)
        for request_id, position in zip(stored.request_ids, after, strict=False):
            standing = await self._gateway.streams.standing(request_id, n, position)
            if standing is None:
                raise StreamNotFound("This stream is not known here any more.")
            if standing is Standing.AHEAD:
                raise InvalidRequest(f"{param} is beyond the end of the stream.", param)
            if standing is Standing.LOST:
                raise ResumePositionLost("The stream was rewritten and cannot be continued from there.", param)
