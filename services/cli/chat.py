"""`slipstream chat`: a conversation in the terminal with a running gateway."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

_HELP = "Type a message and press Enter; /new starts over, /bye ends."


class Chat:
    """Keeps the conversation and prints answers as they come."""

    def __init__(self, url: str, model: str, api_key: str, temperature: float | None) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._sampling = {} if temperature is None else {"temperature": temperature}
        self._messages: list[dict[str, str]] = []

    async def run(self, prompt: str | None) -> int:
        """Exit status: 0, or 1 when the gateway could not be used."""
        timeout = aiohttp.ClientTimeout(total=None, connect=5)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            try:
                self._model = self._model or await self._first_model(session)
                if prompt is not None:
                    await self._ask(session, prompt)
                else:
                    await self._converse(session)
            except (aiohttp.ClientError, TimeoutError, ChatRefused) as error:
                print(f"slipstream: {self._url}: {str(error) or type(error).__name__}", file=sys.stderr)
                return 1
        return 0

    async def _converse(self, session: aiohttp.ClientSession) -> None:
        print(f"{self._model} at {self._url}. {_HELP}", file=sys.stderr)
        while True:
            try:
                line = (await asyncio.to_thread(input, "> ")).strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/bye":
                return
            if line == "/new":
                self._messages.clear()
            elif line:
                await self._ask(session, line)

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self._url}/v1/models") as response:
            await _require_ok(response)
            return str((await response.json())["data"][0]["id"])

    async def _ask(self, session: aiohttp.ClientSession, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        body = {"model": self._model, "messages": self._messages, "stream": True, **self._sampling}
        body["stream_options"] = {"include_usage": True}
        started, answer, usage = time.monotonic(), "", None
        async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            await _require_ok(response)
            async for chunk in _chunks(response):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    piece = choice["delta"].get("content") or ""
                    answer += piece
                    print(piece, end="", flush=True)
        print()
        if usage:
            rate = usage["completion_tokens"] / max(time.monotonic() - started, 1e-9)
            print(f"({usage['completion_tokens']} tokens, {rate:.1f} a second)", file=sys.stderr)
        self._messages.append({"role": "assistant", "content": answer})


class ChatRefused(Exception):
    """The gateway answered with an error; the text is its message."""


async def _require_ok(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        raise ChatRefused((await response.json())["error"]["message"])
    except (aiohttp.ContentTypeError, json.JSONDecodeError, KeyError, TypeError):
        raise ChatRefused(f"HTTP {response.status}") from None


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise ChatRefused(chunk["error"]["message"])
        yield chunk
