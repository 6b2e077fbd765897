"""Tokens per second with and without speculation, over kinds of prompts and streams at once, in one run.

    python -m benchmarks.speculation --rounds 3 --out docs/data/speculation.json

Two `slipstream serve` run side by side, one of them with `--speculation none`, begun anew for each round, because two
processes of one program differ by several per cent; while one is loaded the other is idle. Each cell is measured three
times in turn, with prompts of its own: on the server without speculation, on the one with it, and there again
with requests that forbid it, which says what a ratio of 1 looks like here. So many streams at once, each followed by
another until all requests are through, greedy or sampled with a seed; the three answers to a request must be equal.
The tables over all kinds of prompts compare with the other server and with the same one. `--tables FILE` prints those
of a raw file. A few rounds cannot tell 3 % in one cell: with `--again RATIO` more rounds of those cells of the file
`--out` follow whose median is lower, and count together with the ones before. What is measured again because it was
low rises by chance: means over kinds are those of the rounds that all cells have.

Two speeds are taken of each load: while all streams are busy, which is what so many streams at once means, and of the
whole load with its end, when there is nothing left to begin. Without guesses all answers, of one length, end together;
with them some end early, and the last ones run in small steps with the machine to themselves. So the end of a short
load makes guesses look slower than they are for streams that go on.
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
from dataclasses import dataclass
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

STREAMS = {1: 5, 4: 12, 8: 24, 16: 48, 32: 64}
"""Streams at once, and requests of a measurement."""

TEMPERATURES = (0.0, 1.0)
PROMPTS_OF_A_ROUND = sum(STREAMS.values()) * len(TEMPERATURES) * len(KINDS)
"""So many follow each other; a server sees no prompt twice but for the load that forbids guesses."""

OUTPUT_LEN = 128
SETTLE_S = 8.0
"""After the start, in which workers measure what their steps cost."""

WITHOUT, WITH, OFF = "without", "with", "forbidden"
BUSY = "busy"
"""Where a measurement has the speeds while all streams were busy."""

FORBIDDING = {"speculation": "none", "cache_salt": OFF}
"""The salt keeps prompts of one load from being found computed by the other."""

Cell = tuple[float, str, int]
"""Temperature, kind of prompts, and streams at once."""

PORT = 18970


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer; `arrivals` are the times at which there were so many characters of it."""

    text: str
    num_tokens: int
    arrivals: list[tuple[float, int]]

    def tokens_until(self, time_s: float) -> float:
        """Tokens that had come by then, taken to be in proportion to the characters."""
        come = max((length for when, length in self.arrivals if when <= time_s), default=0)
        return self.num_tokens * come / max(1, len(self.text))


async def generate(session: aiohttp.ClientSession, url: str, prompt: list[int], fields: dict[str, Any]) -> Answer:
    """Raises RuntimeError when it fails."""
    body = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": OUTPUT_LEN,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    parser, text, num_tokens, arrivals = EventParser(), "", 0, list[tuple[float, int]]()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        while not parser.is_done:
            data = await response.content.readany()
            for event in parser.feed(data) if data else parser.end():
                text += "".join(choice.get("text") or "" for choice in event.get("choices", ()))
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            arrivals.append((time.perf_counter(), len(text)))
            if not data and not parser.is_done:
                raise RuntimeError("the stream broke off")
    return Answer(text, num_tokens, arrivals)


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of a load, and when it began, when the first stream had no more to do, and when all were through."""

    answers: list[Answer]
    began: float
    first_idle: float
    ended: float

    @property
    def speed(self) -> float:
        """Output tokens per second of the whole load."""
        return sum(answer.num_tokens for answer in self.answers) / (self.ended - self.began)

    @property
    def busy_speed(self) -> float:
        """The same while all streams were busy."""
        return sum(answer.tokens_until(self.first_idle) for answer in self.answers) / (self.first_idle - self.began)


async def load(url: str, prompts: Sequence[list[int]], streams: int, fields: dict[str, Any]) -> Load:
    """Each stream begins with the next prompt once its answer is through; `fields` are those of all requests."""
    answers, idle = dict[int, Answer](), list[float]()
    waiting = iter(range(len(prompts)))

    async def stream(session: aiohttp.ClientSession) -> None:
        for index in waiting:
            answers[index] = await generate(session, url, prompts[index], fields | {"seed": index})
        idle.append(time.perf_counter())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(stream(session) for _ in range(streams)))
    return Load([answers[index] for index in range(len(prompts))], began, min(idle), max(idle))


def measure(codec: TextCodec, kind: str, streams: int, temperature: float, number: int, first: int) -> dict[str, Any]:
    """One cell in the three ways; round `number` says which goes first. Prompts are those from `first` on."""
    texts = [KINDS[kind](first + index) for index in range(STREAMS[streams])]
    prompts = [codec.encode_chat(codec.template.render([{"role": "user", "content": text}])) for text in texts]
    found: dict[str, Any] = {"kind": kind, "streams": streams, "temperature": temperature, "round": number}
    ways = {WITHOUT: (PORT, {}), WITH: (PORT + 1, {}), OFF: (PORT + 1, FORBIDDING)}
    texts_by_way = {}
    for name, (port, fields) in itertools.islice(itertools.cycle(ways.items()), number % 3, number % 3 + 3):
        loading = load(f"http://127.0.0.1:{port}", prompts, streams, {"temperature": temperature, **fields})
        loaded = asyncio.run(loading)
        found[name] = loaded.speed
        found.setdefault(BUSY, {})[name] = loaded.busy_speed
        texts_by_way[name] = [(answer.text, answer.num_tokens) for answer in loaded.answers]
    if any(answers != texts_by_way[WITHOUT] for answers in texts_by_way.values()):
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
            ratios = [result[name] / result[WITHOUT] for result in same]
            speed = median(result[name] for result in same)
            cells.append(f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}], {speed:.0f}")
        lines.append(f"| {kind}, T = {temperature:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_over_kinds(results: Sequence[dict[str, Any]], other: str) -> str:
    """With speculation to one of the other ways: geometric mean of all ratios, its standard error, and their number."""
    columns = list(dict.fromkeys(result["streams"] for result in results))
    lines = [f"| against {other} | " + " | ".join(map(str, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    for temperature in dict.fromkeys(result["temperature"] for result in results):
        cells = []
        for streams in columns:
            same = [r for r in results if (r["temperature"], r["streams"]) == (temperature, streams)]
            logs = [math.log(r[WITH] / r[other]) for r in same]
            error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
            ratio = math.exp(mean(logs))
            cells.append(f"{ratio:.3f} ± {ratio * error:.3f} ({len(logs)})")
        lines.append(f"| T = {temperature:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weak_cells(results: Sequence[dict[str, Any]], below: float) -> list[Cell]:
    """Those whose median ratio to the server without speculation is lower, by busy streams."""
    ratios: dict[Cell, list[float]] = {}
    for result in results:
        cell = result["temperature"], result["kind"], result["streams"]
        ratios.setdefault(cell, []).append(result[BUSY][WITH] / result[BUSY][WITHOUT])
    return [cell for cell, found in ratios.items() if median(found) < below]


def tables_of(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By their names in the raw file; those of busy streams where they were taken."""
    tables = _tables(results)
    if all(BUSY in result for result in results):
        busy = _tables([result | result[BUSY] for result in results])
        tables = {f"{name}, {BUSY}": table for name, table in busy.items()} | tables
    return tables


def _tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    cells = {name: render(results, name) for name in (WITH, OFF)}
    return cells | {f"against {other}": render_over_kinds(results, other) for other in (WITHOUT, OFF)}


def printed(tables: dict[str, str]) -> str:
    return "\n\n".join(f"{name}:\n\n{table}" for name, table in tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
    parser.add_argument("--temperatures", type=float, nargs="*", default=list(TEMPERATURES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kernels", default="auto", help="what computes the model in both servers")
    parser.add_argument("--draft", default="", help="folder of a draft model for the server that speculates")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", type=float, help="more rounds of the cells of the file --out below this ratio")
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of this raw file")
    options = parser.parse_args()
    if options.tables:
        print(printed(tables_of(json.loads(options.tables.read_text())["runs"])))
        return
    codec, results = load_tokenizer(resolve("smollm2")), list[dict[str, Any]]()
    flags = ("--draft", options.draft) if options.draft else ()
    without = slipstream("smollm2", "--kernels", options.kernels, "--speculation", "none")
    speculating = slipstream("smollm2", "--kernels", options.kernels, *flags)
    cells: list[Cell] = list(itertools.product(options.temperatures, options.kinds, options.streams))
    if options.again:
        if options.out is None or not options.out.exists():
            parser.error("--again needs --out with the raw file of an earlier run")
        results = json.loads(options.out.read_text())["runs"]
        cells = weak_cells(results, options.again)
    first, done = 0, max((result["round"] + 1 for result in results), default=0)
    for number in range(done, done + options.rounds):
        with without.running(PORT), speculating.running(PORT + 1):
            time.sleep(SETTLE_S)
            for temperature, kind, streams in cells:
                results.append(measure(codec, kind, streams, temperature, number, first))
                first += STREAMS[streams]
        tables = tables_of(results)
        write_raw(options.out, results, **{name: table.splitlines() for name, table in tables.items()})
        print(f"round {number + 1 - done} of {options.rounds} done", file=sys.stderr, flush=True)
    print(printed(tables_of(results)))


if __name__ == "__main__":
    main()
