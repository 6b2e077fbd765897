"""One streamed completion, timed from the client's side."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from services.bench.events import EventParser, StreamError
from services.bench.options import BenchOptions

_MAX_ERROR = 200


@dataclass(slots=True)
class Sample:
    """What one request showed. Times in seconds; `gaps` lie between chunks that carried text, which came at `times`
    (as `time.perf_counter` counts).

    `path`, `handoff_ms` and `kv_bytes` come from Slipstream's usage details and stay empty elsewhere.
    """

    ttft: float | None = None
    times: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int | None = None
    path: str = ""
    handoff_ms: float | None = None
    kv_bytes: int = 0
    error: str = ""

    @property
    def num_chunks(self) -> int:
        return len(self.times)

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]


async def stream_one(
    session: aiohttp.ClientSession,
    options: BenchOptions,
    model: str,
    prompt: list[int] | str,
    seed: int,
    sample: Sample | None = None,
) -> Sample:
    """Send one request and read its stream to the end, filling `sample` as it comes.

    Never raises for what the server does wrong: see `error`.
    """
    sample = sample or Sample()
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
    parser = EventParser()
    while not parser.is_done:
        data = await content.readany()
        now = time.perf_counter()
        for event in parser.feed(data) if data else parser.end():
            if _take(sample, event):
                sample.ttft = now - start if sample.ttft is None else sample.ttft
                sample.times.append(now)
        if not data and not parser.is_done:
            raise StreamError("the stream broke off before [DONE]")
    # A server that reports no usage is taken to send one token a chunk.
    sample.output_tokens = sample.output_tokens or sample.num_chunks


def _take(sample: Sample, event: dict[str, Any]) -> bool:
    """Whether an event carries text. Raises StreamError when it is an error."""
    if event.get("error"):
        raise StreamError(str(event["error"]))
    usage = event.get("usage")
    if isinstance(usage, dict):
        _take_usage(sample, usage)
    return _has_text(event)


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
