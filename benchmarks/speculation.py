"""Tokens per second with and without speculation, over kinds of prompts and streams at once, in one run.

    python -m benchmarks.speculation --rounds 3 --out docs/data/speculation.json

Two `slipstream serve` run side by side, one of them with `--speculation none`, begun anew for each round, because two
processes of one program differ by several per cent; while one is loaded the other is idle. Each cell is measured three
ways in turn, with prompts of its own: on the server without speculation, on the one with it, and there again
with requests that forbid it. So many streams at once, each followed by another until all requests are through, greedy
or sampled with a seed; the three answers to a request must be equal.

A few loads of seconds cannot tell 3 %: with `--turns` each cell has more of them in a round, and with `--more` the
rounds are added to those of the file `--out`. The means compare speculation with the other server and, where the
process and its memory are the same, with forbidding; what forbidding itself costs, over all cells, is a table of its
own. `--tables FILE` prints the tables of a raw file.

Two speeds are taken of each load: while all streams are busy, which is what so many streams at once means, and of the
whole load with its end, when there is nothing left to begin. Without guesses all answers, of one length, end together;
with them some end early, and the last ones run in small steps with the machine to themselves. So the end of a short
load makes guesses look slower than they are for streams that go on. The speed while all are busy is that until as many
tokens have come as when the first stream of any of the three loads had no more to do: the same work in all three.
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

from benchmarks.raw import commit, write_raw
from benchmarks.server import slipstream
from benchmarks.speculation_prompts import KINDS
from services.bench.events import EventParser
from shared.model.source import resolve
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.loader import load_tokenizer

STREAMS = {1: 5, 4: 12, 8: 24, 16: 48, 32: 64}
"""Streams at once, and requests of a measurement."""

TEMPERATURES = (0.0, 1.0)
MAX_TURNS = 4
PROMPTS_OF_A_ROUND = MAX_TURNS * sum(STREAMS.values()) * len(TEMPERATURES)
"""Of each kind, at most; a server sees none of them twice but for the load that forbids guesses."""

OUTPUT_LEN = 128
SETTLE_S = 8.0
"""After the start, in which workers measure what their steps cost."""

WITHOUT, WITH, OFF = "without", "with", "forbidden"
COMPARED = ((WITH, WITHOUT), (WITH, OFF), (OFF, WITHOUT))
BUSY = "busy"
"""Where a measurement has the speeds while all streams were busy."""

FORBIDDING = {"speculation": "none", "cache_salt": OFF}
"""The salt keeps prompts of one load from being found computed by the other."""

PORT = 18970


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer; `arrivals` are the times at which there were so many characters of it."""

    text: str
    num_tokens: int
    arrivals: list[tuple[float, int]]

    @property
    def progress(self) -> list[tuple[float, float]]:
        """When how many tokens had come, taken to be in proportion to the characters."""
        return [(when, self.num_tokens * length / max(1, len(self.text))) for when, length in self.arrivals]


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
    def progress(self) -> list[tuple[float, float]]:
        """When how many tokens of all answers had come."""
        events = []
        for answer in self.answers:
            steps = zip([(0.0, 0.0), *answer.progress], answer.progress, strict=False)
            events += [(when, after - before) for (_, before), (when, after) in steps]
        events.sort()
        return list(zip([when for when, _ in events], itertools.accumulate(new for _, new in events), strict=True))

    @property
    def busy_tokens(self) -> float:
        """So many had come when the first stream had no more to do."""
        return max((tokens for when, tokens in self.progress if when <= self.first_idle), default=0.0)

    def speed_until(self, num_tokens: float) -> float:
        """Output tokens per second until so many had come."""
        reached = (tokens / (when - self.began) for when, tokens in self.progress if tokens >= num_tokens)
        return next(reached, self.speed)


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


def measure(codec: TextCodec, kind: str, streams: int, temperature: float, turn: int, first: int) -> dict[str, Any]:
    """One cell in the three ways, in each turn in another order; prompts are those from `first` on.

    What follows a load of the same server may find it warm: of the two ways on one server each does so three times in
    six turns.
    """
    texts = [KINDS[kind](first + index) for index in range(STREAMS[streams])]
    prompts = [codec.encode_chat(codec.template.render([{"role": "user", "content": text}])) for text in texts]
    found: dict[str, Any] = {"kind": kind, "streams": streams, "temperature": temperature}
    ways = {WITHOUT: (PORT, {}), WITH: (PORT + 1, {}), OFF: (PORT + 1, FORBIDDING)}
    loads = dict[str, Load]()
    orders = list(itertools.permutations(ways))
    for name in orders[turn % len(orders)]:
        port, fields = ways[name]
        loading = load(f"http://127.0.0.1:{port}", prompts, streams, {"temperature": temperature, **fields})
        loads[name] = asyncio.run(loading)
    answers = [[(answer.text, answer.num_tokens) for answer in loaded.answers] for loaded in loads.values()]
    if any(others != answers[0] for others in answers):
        raise RuntimeError(f"{kind}, {streams} streams: the answers differ")
    num_tokens = min(loaded.busy_tokens for loaded in loads.values())
    busy = {name: loaded.speed_until(num_tokens) for name, loaded in loads.items()}
    return found | {name: loaded.speed for name, loaded in loads.items()} | {BUSY: busy}


def render(results: Sequence[dict[str, Any]], name: str) -> str:
    """One way's ratios to the server without speculation, as Markdown: median, minimum, maximum; and its speed."""
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


def render_means(results: Sequence[dict[str, Any]], name: str, other: str) -> str:
    """One way's ratios to another's, by kind and over all kinds: geometric mean, its standard error, their number."""
    columns = list(dict.fromkeys(result["streams"] for result in results))
    header = f"| {name} against {other} | "
    lines = [header + " | ".join(map(str, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    for temperature in dict.fromkeys(result["temperature"] for result in results):
        of_temperature = [result for result in results if result["temperature"] == temperature]
        kinds = list(dict.fromkeys(result["kind"] for result in of_temperature))
        for label, included in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
            cells = [
                _mean_ratio(
                    [r for r in of_temperature if r["streams"] == streams and r["kind"] in included], name, other
                )
                for streams in columns
            ]
            lines.append(f"| {label}, T = {temperature:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_ratio(results: Sequence[dict[str, Any]], name: str, other: str) -> str:
    logs = [math.log(result[name] / result[other]) for result in results]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    ratio = math.exp(mean(logs))
    return f"{ratio:.3f} ± {ratio * error:.3f} ({len(logs)})"


def tables_of(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By their names in the raw file; those of busy streams where they were taken."""
    tables = _tables(results)
    if all(BUSY in result for result in results):
        busy = _tables([result | result[BUSY] for result in results])
        tables = {f"{name}, {BUSY}": table for name, table in busy.items()} | tables
    return tables


def _tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    means = {f"{name} against {other}": render_means(results, name, other) for name, other in COMPARED}
    return {WITH: render(results, WITH)} | means


def printed(tables: dict[str, str]) -> str:
    return "\n\n".join(f"{name}:\n\n{table}" for name, table in tables.items())


def cannot_continue(out: Path | None) -> str:
    """Why rounds cannot be added to that file; empty where they can."""
    if out is None or not out.exists():
        return "name the raw file of an earlier run by --out"
    if (earlier := json.loads(out.read_text())["commit"]) != commit():
        return f"{out} was measured with {earlier}, and this is {commit()}: write another file"
    return ""


def parsed() -> argparse.Namespace:
    """What to measure; the process ends where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
    parser.add_argument("--temperatures", type=float, nargs="*", default=list(TEMPERATURES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kernels", default="auto", help="what computes the model in both servers")
    parser.add_argument("--draft", default="", help="folder of a draft model for the server that speculates")
    parser.add_argument("--out", type=Path)
    turns = range(1, MAX_TURNS + 1)
    parser.add_argument(
        "--turns", type=int, default=1, choices=turns, help="loads of each cell in a round, with other prompts"
    )
    parser.add_argument("--more", action="store_true", help="add the rounds to those of the file --out")
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of this raw file")
    options = parser.parse_args()
    if options.more and not options.tables and (reason := cannot_continue(options.out)):
        parser.error(f"--more: {reason}")
    return options


def main() -> None:
    options = parsed()
    if options.tables:
        print(printed(tables_of(json.loads(options.tables.read_text())["runs"])))
        return
    earlier = json.loads(options.out.read_text()) if options.more else {}
    results = earlier.get("runs", [])
    commands = [*earlier.get("earlier_commands", []), earlier["command"]] if earlier else []
    codec = load_tokenizer(resolve("smollm2"))
    flags = ("--draft", options.draft) if options.draft else ()
    without = slipstream("smollm2", "--kernels", options.kernels, "--speculation", "none")
    speculating = slipstream("smollm2", "--kernels", options.kernels, *flags)
    cells = list(itertools.product(options.temperatures, options.kinds, options.streams))
    done = max((result["round"] + 1 for result in results), default=0)
    for number in range(done, done + options.rounds):
        with without.running(PORT), speculating.running(PORT + 1):
            time.sleep(SETTLE_S)
            first = dict.fromkeys(KINDS, 0)
            for turn, (temperature, kind, streams) in itertools.product(range(options.turns), cells):
                found = measure(codec, kind, streams, temperature, options.turns * number + turn, first[kind])
                results.append(found | {"round": number, "turn": turn})
                first[kind] += STREAMS[streams]
        tables = {name: table.splitlines() for name, table in tables_of(results).items()}
        write_raw(options.out, results, earlier_commands=commands, **tables)
        print(f"round {number + 1 - done} of {options.rounds} done", file=sys.stderr, flush=True)
    print(printed(tables_of(results)))


if __name__ == "__main__":
    main()
