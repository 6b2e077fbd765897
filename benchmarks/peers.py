"""Slipstream beside other servers on one machine: the same prompts, the same lengths, HTTP streaming, in turn.

    python -m benchmarks.peers --rounds 3 --out docs/data/peers.json \\
        --peer 'llama.cpp Q4_0=llama-server -m Q4_0.gguf --host 127.0.0.1 --port {port} -t 2 -tb 2 -np 32 -c 16384'

A peer is any command that starts an OpenAI-compatible server on `{port}`. Each round starts every server once, measures
decoding at several numbers of streams, prefill of long prompts, and the gaps of running streams while long prompts
arrive, and stops it. Figures are ratios of one run to the next: medians over rounds with minimum and maximum.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.raw import write_raw
from benchmarks.server import OURS, Server, slipstream
from benchmarks.steady_streams import SteadyStreams
from services.bench.load import run_bench
from services.bench.options import BenchOptions
from services.bench.report import percentile

STREAMS = {1: 6, 8: 24, 32: 64}
"""Streams at once, and requests measured."""

PROMPT_LEN, OUTPUT_LEN = 64, 128
PREFILLS = {512: 4, 2048: 3}
"""Prompt tokens, and requests measured one after the other with a single token of output."""

RUNNING, STREAMS_IN_ALL, LONG_OUTPUT_LEN, LEAD_S = 8, 64, 1000, 1.5
ARRIVALS, ARRIVING = 4, 2048
SETTLE_S = 8.0
"""After the start: ours measures what its steps cost while it has nothing to do."""


class Family:
    """A server's processes: peak memory and processor time of all of them."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def _members(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def peak_mib(self) -> float:
        """Sum of the peaks of resident memory; pages that processes share count in each."""
        total = 0
        for member in self._members():
            with suppress(OSError):
                lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return total / 1024

    def private_mib(self) -> float:
        """Sum of proportional set sizes now: shared pages are divided among those who share them."""
        total = 0
        for member in self._members():
            with suppress(OSError):
                lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def cpu_s(self) -> float:
        return sum(sum(member.cpu_times()[:2]) for member in self._members())


def measure(options: BenchOptions) -> dict[str, Any]:
    """One load; raises RuntimeError when any request failed."""
    report = asyncio.run(run_bench(options))
    if not report.ok:
        raise RuntimeError(f"{options.label}: {report.errors} requests failed, the first: {report.first_error}")
    return {
        "output_tokens_per_s": report.output_tokens_per_s,
        "ttft_ms": report.ttft_ms,
        "itl_ms": report.itl_ms,
        "chunks_per_token": report.chunks_per_token,
    }


async def gaps_beside_arrivals(options: BenchOptions) -> dict[str, Any]:
    """Running streams' gaps, alone and while long prompts arrive one after the other.

    A stream that ends is followed by another, so that each prompt is computed beside all of them; gaps count from the
    first prompt's start to the last one's first token.
    """
    steady = replace(options, concurrency=RUNNING, requests=RUNNING, prompt_len=PROMPT_LEN)
    alone = await run_bench(replace(steady, output_len=OUTPUT_LEN))
    arrivals = replace(options, concurrency=1, requests=ARRIVALS, warmup=0, prompt_len=ARRIVING, output_len=1, seed=77)
    async with SteadyStreams(replace(steady, requests=STREAMS_IN_ALL, output_len=LONG_OUTPUT_LEN, seed=5)) as streams:
        await asyncio.sleep(LEAD_S)
        began = time.perf_counter()
        arrived = await run_bench(arrivals)
        gaps = streams.gaps(began, time.perf_counter())
    return {
        "alone_itl_ms": alone.itl_ms,
        "beside_itl_ms": {f"p{q}": round(1000 * (percentile(gaps, q) or 0.0), 3) for q in (50, 90, 99)},
        "arrivals_ttft_ms": arrived.ttft_ms,
    }


def one_round(server: Server, port: int, number: int) -> dict[str, Any]:
    """Everything of one server, started for it and stopped afterwards."""
    found: dict[str, Any] = {"server": server.name, "round": number, "streams": {}, "prefill": {}}
    with server.running(port) as process:
        time.sleep(SETTLE_S)
        family = Family(process.pid)
        base = BenchOptions(
            base_url=f"http://127.0.0.1:{port}", pids=(process.pid,), label=server.name, seed=number * 1000
        )
        for streams, requests in STREAMS.items():
            before = family.cpu_s()
            load = replace(base, concurrency=streams, requests=requests, prompt_len=PROMPT_LEN, output_len=OUTPUT_LEN)
            result = measure(replace(load, warmup=2, seed=base.seed + streams))
            spent = family.cpu_s() - before
            result["cpu_us_per_token"] = 1e6 * spent / ((requests + 2) * OUTPUT_LEN)
            found["streams"][streams] = result
        for length, requests in PREFILLS.items():
            load = replace(base, requests=requests, prompt_len=length, output_len=1, seed=base.seed + length)
            ttft = measure(load)["ttft_ms"]["p50"]
            found["prefill"][length] = {"ttft_ms": ttft, "tokens_per_s": 1000 * length / ttft}
        found["long_prompts"] = asyncio.run(gaps_beside_arrivals(replace(base, seed=base.seed + 9)))
        found["pss_mib"] = family.private_mib()
        found["peak_rss_mib"] = family.peak_mib()
    return found


def columns(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{column: {server: values over rounds}}."""
    table: dict[str, dict[str, list[float]]] = {}
    for result in results:
        cells = {f"{n} streams, tokens/s": load["output_tokens_per_s"] for n, load in result["streams"].items()}
        cells |= {f"prefill {n}, tokens/s": load["tokens_per_s"] for n, load in result["prefill"].items()}
        cells["gap p99 alone, ms"] = result["long_prompts"]["alone_itl_ms"]["p99"]
        cells["gap p50 beside 2048-token prompts, ms"] = result["long_prompts"]["beside_itl_ms"]["p50"]
        cells["gap p99 beside 2048-token prompts, ms"] = result["long_prompts"]["beside_itl_ms"]["p99"]
        cells["those prompts' first token, ms"] = result["long_prompts"]["arrivals_ttft_ms"]["p50"]
        cells["peak memory, MiB"] = result["peak_rss_mib"]
        for name, value in cells.items():
            table.setdefault(name, {}).setdefault(result["server"], []).append(value)
    return table


def render(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one line a column of figures, one column a server, and each of ours over the best other."""
    table = columns(results)
    servers = list(dict.fromkeys(result["server"] for result in results))
    ours = [server for server in servers if is_ours(server)]
    titles = [*servers, *(f"{server} to the best other" for server in ours)]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for name, by_server in table.items():
        cells = [f"{median(v):.0f} [{min(v):.0f}-{max(v):.0f}]" for v in (by_server[server] for server in servers)]
        cells += [_ratio(name, by_server, server) for server in ours]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_ours(server: str) -> bool:
    """Slipstream with its defaults, or with other flags as one more peer: `slipstream NAME=slipstream serve ...`."""
    return server.startswith(OURS)


def _ratio(column: str, by_server: dict[str, list[float]], server: str) -> str:
    """One server of ours over the best that is not ours, round by round: median and extremes."""
    best = max if "tokens/s" in column else min
    others = [values for name, values in by_server.items() if not is_ours(name)]
    if not others:
        return "-"
    leader = best(others, key=median)
    ratios = [ours / theirs for ours, theirs in zip(by_server[server], leader, strict=False)]
    return f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


def parse_peer(text: str) -> Server:
    name, sign, command = text.partition("=")
    if not sign or "{port}" not in command:
        raise argparse.ArgumentTypeError("a peer is NAME=COMMAND, with {port} where the port goes")
    return Server(name, tuple(shlex.split(command)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2", help="what `slipstream serve` serves")
    parser.add_argument("--serve-flags", default="", help="more flags of `slipstream serve`")
    parser.add_argument("--peer", type=parse_peer, action="append", default=[])
    parser.add_argument("--port", type=int, default=18960)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    servers = [slipstream(options.model, *shlex.split(options.serve_flags)), *options.peer]
    results = []
    for number in range(options.rounds):
        for server in servers:
            results.append(one_round(server, options.port, number))
            write_raw(options.out, results, table=render(results).splitlines())
            print(f"round {number + 1} of {options.rounds}: {server.name} done", file=sys.stderr, flush=True)
    print(render(results))


if __name__ == "__main__":
    main()
