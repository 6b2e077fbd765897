"""A client as resilient as a good one: it asks again when refused, and resumes on another gateway when cut off.

It trusts nothing: it records every event with its id and its time, so that a lost or doubled token can be seen later.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.faults.requests import Answer, Spec, add_part

SILENCE_S = 4.0
PAUSE_S = 0.2
DEADLINE_S = 120.0

FINISHED = "finished"
FAILED = "failed"
LEFT = "left"

_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(slots=True)
class Record:
    """All that one client saw of one request."""

    spec: Spec
    started: float
    gateways: list[str] = field(default_factory=list)
    response_id: str = ""
    events: list[tuple[str, float]] = field(default_factory=list)
    answer: Answer = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    refusals: int = 0
    breaks: list[str] = field(default_factory=list)
    posts: int = 0
    restarts: int = 0
    error: str = ""
    ended: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        return self.ends[0] if self.ends else ""

    @property
    def last_id(self) -> str:
        return self.events[-1][0] if self.events else ""

    @property
    def resumes(self) -> int:
        """How often it went on elsewhere after its connection broke."""
        return len(self.breaks)

    def begins_again(self) -> None:
        """The answer is read from its beginning; what came before counts for nothing."""
        self.restarts += 1
        self.answer.clear()
        self.events.clear()

    @property
    def first_event_s(self) -> float | None:
        return self.events[0][1] - self.started if self.events else None


class Refused(Exception):
    """The server has no room or no worker now: the request was not accepted, ask again."""


class Broken(Exception):
    """The answer stopped before its end; the request may go on."""


class PositionLost(Exception):
    """Redis lost what the client had read, and the gateway it comes to never had it."""


class Failed(Exception):
    """The request ended with an error that trying again cannot mend."""


class Client:
    """Sends requests to any of `urls()`, which may change at any time."""

    def __init__(self, http: aiohttp.ClientSession, urls: Callable[[], Sequence[str]]) -> None:
        self._http = http
        self._urls = urls
        self._turn = itertools.count()

    async def ask(self, spec: Spec, deadline_s: float = DEADLINE_S, record: Record | None = None) -> Record:
        """Run one request to its end, whatever it takes within the deadline; a given `record` can be watched."""
        record = record or Record(spec, time.monotonic())
        key = f"faults-{secrets.token_hex(12)}"
        while not record.ends:
            if time.monotonic() - record.started > deadline_s:
                record.error = record.error or "no end within the deadline"
                record.ends.append(FAILED)
                break
            try:
                await self._attempt(record, key)
            except Refused as refusal:
                record.refusals += 1
                record.error = str(refusal)
                await asyncio.sleep(PAUSE_S)
            except (Broken, *_BROKEN) as broken:
                record.error = f"{type(broken).__name__}: {broken}"
                record.breaks.append(f"{record.gateways[-1]} after event {record.last_id or 'none'}: {record.error}")
                await asyncio.sleep(PAUSE_S)
            except PositionLost as lost:  # what a client is told to do then: read from the beginning
                record.breaks.append(str(lost))
                record.begins_again()
            except Failed as failure:
                record.error = "; ".join([*record.breaks, str(failure)])
                record.ends.append(FAILED)
        record.ended = time.monotonic()
        return record

    async def _attempt(self, record: Record, key: str) -> None:
        url = self._next_url()
        record.gateways.append(url)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=2.0, sock_read=SILENCE_S if record.spec.stream else 60.0
        )
        if record.spec.stream and (record.last_id or record.restarts):
            headers = {"Last-Event-ID": record.last_id} if record.last_id else {}
            request = self._http.get(f"{url}/v1/streams/{record.response_id}", headers=headers, timeout=timeout)
        else:
            record.posts += 1
            body = record.spec.body | {"stream": record.spec.stream}
            headers = {"Idempotency-Key": key}
            request = self._http.post(url + record.spec.path, json=body, headers=headers, timeout=timeout)
        async with request as response:
            await _check(response)
            record.response_id = response.headers.get("x-slipstream-id", record.response_id)
            if record.spec.stream:
                await self._read_stream(record, response)
            else:
                self._take_whole(record, json.loads(await response.read()))

    def _next_url(self) -> str:
        urls = self._urls()
        if not urls:
            raise Refused("no gateway runs")
        return urls[next(self._turn) % len(urls)]

    async def _read_stream(self, record: Record, response: aiohttp.ClientResponse) -> None:
        async for event_id, data in events_of(response.content):
            if data == "[DONE]":
                record.ends.append(FINISHED)
                return
            body = json.loads(data)
            if "error" in body:
                self._take_error(body["error"])
            record.response_id = body.get("id", record.response_id)
            record.usage = body.get("usage") or record.usage
            for choice in body["choices"]:
                add_part(record.answer, choice)
            if event_id:
                record.events.append((event_id, time.monotonic()))
            if record.spec.leaves_after and len(record.events) >= record.spec.leaves_after:
                record.ends.append(LEFT)
                return
        raise Broken("the stream ended without a word")

    def _take_error(self, error: dict[str, Any]) -> None:
        if (error.get("retry") or {}).get("resume"):
            raise Broken(str(error.get("code")))
        raise Failed(f"{error.get('code')}: {error.get('message')}")

    def _take_whole(self, record: Record, body: dict[str, Any]) -> None:
        record.answer.clear()
        record.usage = body.get("usage") or {}
        for choice in body["choices"]:
            add_part(record.answer, choice)
        record.ends.append(FINISHED)


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = (await response.text())[:300]
    if response.status in (429, 503):
        raise Refused(text)
    if response.status == 409 and "resume_position_lost" in text:
        raise PositionLost(text)
    raise Failed(f"{response.status} {text}")


async def events_of(lines: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str]]:
    """(id, data) of each server-sent event."""
    event_id, data = "", ""
    async for raw in lines:
        line = raw.decode().rstrip("\n")
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield event_id, data
            event_id, data = "", ""
