"""Tokens per second with and without speculation, over kinds of prompts and streams at once, in one run.

    python -m benchmarks.speculation --rounds 3 --out docs/data/speculation.json

Three `slipstream serve` run side by side, two of them with `--speculation none`; while one is loaded the others are
idle. Each cell is measured on all in turn, round by round, with prompts that never repeat: so many streams at once,
each followed by another until all requests are through. Greedy or sampled with a seed; a request's answers of the three
must be equal. The ratio of the two that do the same says what a ratio of this machine is worth. The third table is over
all kinds of prompts, against the geometric mean of both; `--tables FILE` prints the tables of a raw file.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import aiohttp

from benchmarks.raw import write_raw
from benchmarks.server import slipstream
from benchmarks.speculation_prompts import KINDS
from services.bench.events import EventParser
from shared.model.source import resolve
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.loader import load_tokenizer

STREAMS = {1: 3, 4: 8, 8: 16, 16: 32, 32: 48}
"""Streams at once, and requests of a measurement."""

OUTPUT_LEN = 128
SETTLE_S = 8.0
"""After the start, in which workers measure what their steps cost."""

PORT = 18970


async def generate(
    session: aiohttp.ClientSession, url: str, prompt: list[int], temperature: float, seed: int
) -> tuple[str, int]:
    """Text and number of tokens of one streamed answer. Raises RuntimeError when it fails."""
    body = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": OUTPUT_LEN,
        "temperature": temperature,
        "seed": seed,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    parser, text, num_tokens = EventParser(), "", 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        while not parser.is_done:
            data = await response.content.readany()
            for event in parser.feed(data) if data else parser.end():
                text += "".join(choice.get("text") or "" for choice in event.get("choices", ()))
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            if not data and not parser.is_done:
                raise RuntimeError("the stream broke off")
    return text, num_tokens


async def load(
    url: str, prompts: Sequence[list[int]], streams: int, temperature: float
) -> tuple[float, list[tuple[str, int]]]:
    """Output tokens per second, and what was answered."""
    answers = [("", 0) for _ in prompts]
    waiting = iter(range(len(prompts)))

    async def stream(session: aiohttp.ClientSession) -> None:
        for index in waiting:
            answers[index] = await generate(session, url, prompts[index], temperature, index)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(stream(session) for _ in range(streams)))
        seconds = time.perf_counter() - began
    return sum(num_tokens for _, num_tokens in answers) / seconds, answers


def measure(
    urls: dict[str, str], codec: TextCodec, kind: str, streams: int, temperature: float, numbers: itertools.count[int]
) -> dict[str, Any]:
    """One cell on all servers, one after the other."""
    texts = [KINDS[kind](next(numbers)) for _ in range(STREAMS[streams])]
    prompts = [codec.encode_chat(codec.template.render([{"role": "user", "content": text}])) for text in texts]
    found: dict[str, Any] = {"kind": kind, "streams": streams, "temperature": temperature}
    answers = {}
    for name, url in urls.items():
        found[name], answers[name] = asyncio.run(load(url, prompts, streams, temperature))
    if any(answer != answers["without"] for answer in answers.values()):
        raise RuntimeError(f"{kind}, {streams} streams: the answers differ")
    return found


def render(results: Sequence[dict[str, Any]], name: str) -> str:
    """A server's ratios to the one without speculation as a Markdown table: median of the rounds, minimum, maximum."""
    columns = list(dict.fromkeys(result["streams"] for result in results))
    lines = ["| prompts | " + " | ".join(map(str, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    for kind, temperature in dict.fromkeys((result["kind"], result["temperature"]) for result in results):
        cells = []
        for streams in columns:
            same = [r for r in results if (r["kind"], r["temperature"], r["streams"]) == (kind, temperature, streams)]
            ratios = [result[name] / result["without"] for result in same]
            speed = median(result[name] for result in same)
            cells.append(f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}], {speed:.0f}")
        lines.append(f"| {kind}, T = {temperature:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_over_kinds(results: Sequence[dict[str, Any]]) -> str:
    """With speculation to the geometric mean of both servers without: geometric mean, its standard error, and count."""
    columns = list(dict.fromkeys(result["streams"] for result in results))
    lines = ["| | " + " | ".join(map(str, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    for temperature in dict.fromkeys(result["temperature"] for result in results):
        cells = []
        for streams in columns:
            same = [r for r in results if (r["temperature"], r["streams"]) == (temperature, streams)]
            logs = [math.log(r["with"] / math.sqrt(r["without"] * r["control"])) for r in same]
            error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
            ratio = math.exp(mean(logs))
            cells.append(f"{ratio:.3f} ± {ratio * error:.3f} ({len(logs)})")
        lines.append(f"| T = {temperature:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables_of(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By their names in the raw file."""
    return {name: render(results, name) for name in ("with", "control")} | {"over kinds": render_over_kinds(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kernels", default="auto", help="what computes the model in all three servers")
    parser.add_argument("--draft", default="", help="folder of a draft model for the server that speculates")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of this raw file")
    options = parser.parse_args()
    if options.tables:
        print("\n\n".join(tables_of(json.loads(options.tables.read_text())["runs"]).values()))
        return
    codec, numbers, results = load_tokenizer(resolve("smollm2")), itertools.count(), list[dict[str, Any]]()
    tables = dict[str, str]()
    flags, kernels = ("--draft", options.draft) if options.draft else (), ("--kernels", options.kernels)
    urls = {name: f"http://127.0.0.1:{PORT + at}" for at, name in enumerate(("without", "with", "control"))}
    with (
        slipstream("smollm2", *kernels, "--speculation", "none").running(PORT),
        slipstream("smollm2", *kernels, *flags).running(PORT + 1),
        slipstream("smollm2", *kernels, "--speculation", "none").running(PORT + 2),
    ):
        time.sleep(SETTLE_S)
        for number in range(options.rounds):
            for temperature, kind, streams in itertools.product(options.temperatures, options.kinds, options.streams):
                order = dict(itertools.islice(itertools.cycle(urls.items()), number % 3, number % 3 + 3))
                results.append(measure(order, codec, kind, streams, temperature, numbers) | {"round": number})
            tables = tables_of(results)
            write_raw(options.out, results, **{name: table.splitlines() for name, table in tables.items()})
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
