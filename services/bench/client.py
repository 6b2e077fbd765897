"""One streamed completion, timed from the client's side."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.bench.options import BenchOptions

MAX_LINE = 1 << 20
_MAX_ERROR = 200


@dataclass(slots=True)
class Sample:
    """What one request showed. Times in seconds; `gaps` lie between chunks that carried text.

    `path`, `handoff_ms` and `kv_bytes` come from Slipstream's usage details and stay empty elsewhere.
    """

    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    num_chunks: int = 0
    output_tokens: int = 0
    prompt_tokens: int | None = None
    path: str = ""
    handoff_ms: float | None = None
    kv_bytes: int = 0
    error: str = ""


class StreamError(Exception):
    """The server answered, but not with a whole stream."""


async def stream_one(
    session: aiohttp.ClientSession, options: BenchOptions, model: str, prompt: list[int] | str, seed: int
) -> Sample:
    """Send one request and read its stream to the end. Never raises for what the server does wrong: see `error`."""
    sample = Sample()
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": options.output_len,
        "temperature": options.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **options.extra,
    }
    start = time.perf_counter()
    try:
        async with session.post(options.url("/v1/completions"), json=body) as response:
            if response.status != 200:
                raise StreamError(f"HTTP {response.status}: {(await response.text())[:_MAX_ERROR]}")
            await _read_stream(response.content, sample, start)
        if sample.num_chunks == 0:
            raise StreamError("the stream ended without a token")
    except (StreamError, aiohttp.ClientError, TimeoutError) as exc:
        sample.error = f"{type(exc).__name__}: {exc}"[:_MAX_ERROR]
    sample.elapsed = time.perf_counter() - start
    return sample


async def _read_stream(content: aiohttp.StreamReader, sample: Sample, start: float) -> None:
    last, ended = start, False
    async for event in _events(content):
        if event is None:
            ended = True
            break
        if event.get("error"):
            raise StreamError(str(event["error"]))
        if isinstance(event.get("usage"), dict):
            _take_usage(sample, event["usage"])
        if not _has_text(event):
            continue
        now = time.perf_counter()
        if sample.ttft is None:
            sample.ttft = now - start
        else:
            sample.gaps.append(now - last)
        last = now
        sample.num_chunks += 1
    if not ended:
        raise StreamError("the stream broke off before [DONE]")
    # A server that reports no usage is taken to send one token a chunk.
    sample.output_tokens = sample.output_tokens or sample.num_chunks


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any] | None]:
    """The `data:` events of an SSE stream; None stands for [DONE]."""
    async for raw in content:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield None
            return
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise StreamError("an event is not a JSON object")
        yield event


def _has_text(event: dict[str, Any]) -> bool:
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(c, dict) and c.get("text") for c in choices)


def _take_usage(sample: Sample, usage: dict[str, Any]) -> None:
    sample.output_tokens = int(_number(usage.get("completion_tokens")) or 0)
    prompt_tokens = _number(usage.get("prompt_tokens"))
    sample.prompt_tokens = None if prompt_tokens is None else int(prompt_tokens)
    details = usage.get("slipstream")
    if isinstance(details, dict):
        sample.path = str(details.get("path") or "")
        sample.kv_bytes = int(_number(details.get("kv_bytes")) or 0)
        sample.handoff_ms = _number(details.get("handoff_ms")) or None  # 0: nothing was handed over


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
