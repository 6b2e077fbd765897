"""SmolLM2 over HTTP, split and row-invariant, against the same without row invariance and against transformers.

    python -m benchmarks.split_against_static --rounds 3 --out docs/data/split-against-static.json

Each round measures the three in turn: `slipstream serve` (invariant), `slipstream serve --no-batch-invariant`, and
transformers' `generate` on a static batch in one process with the same GGUF dequantised to float32. 64 tokens in, 128
out, greedy, end-of-sequence ignored. Figures are medians over rounds with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.server import slipstream

STREAMS = {1: 4, 8: 16, 32: 32}
"""Streams at once, and requests measured."""

PROMPT_LEN, OUTPUT_LEN = 64, 128
PORT = 8971
MODES = {"slipstream": [], "slipstream-not-invariant": ["--no-batch-invariant"]}


def bench(streams: int, requests: int, label: str) -> dict[str, Any]:
    """One `slipstream bench --json` run."""
    command = [sys.executable, "-m", "services.cli", "bench", "--json", "--label", label]
    command += ["--base-url", f"http://127.0.0.1:{PORT}"]
    command += ["--concurrency", str(streams), "--requests", str(requests)]
    command += ["--prompt-len", str(PROMPT_LEN), "--output-len", str(OUTPUT_LEN)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def transformers_rates(streams: list[int]) -> dict[int, float]:
    """Output tokens per second of `generate` on a static batch, prefill included; a process of its own."""
    code = f"from benchmarks.split_against_static import measure_transformers as m; m({streams!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {int(key): value for key, value in json.loads(result.stdout.splitlines()[-1]).items()}


def measure_transformers(streams: list[int]) -> None:
    """Runs in the child: prints the rates as JSON."""
    import torch

    from benchmarks.equal_to_transformers import load_reference
    from shared.model.source import resolve

    model = load_reference(resolve("smollm2"))
    rates = {}
    for count in streams:
        ids = torch.randint(20, 40000, (count, PROMPT_LEN), generator=torch.Generator().manual_seed(count))
        options = {"do_sample": False, "min_new_tokens": OUTPUT_LEN, "max_new_tokens": OUTPUT_LEN, "pad_token_id": 2}
        model.generate(
            ids, attention_mask=torch.ones_like(ids), **(options | {"min_new_tokens": 2, "max_new_tokens": 2})
        )
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        rates[count] = count * OUTPUT_LEN / (time.perf_counter() - started)
    print(json.dumps(rates))


def run(rounds: int) -> dict[str, Any]:
    """All rounds, raw: {mode: {streams: [report or rate per round]}}."""
    raw: dict[str, dict[int, list[Any]]] = {mode: {n: [] for n in STREAMS} for mode in [*MODES, "transformers"]}
    for number in range(rounds):
        for mode, flags in MODES.items():
            with slipstream("smollm2", "--kernels", "torch", *flags).running(PORT):
                for streams, requests in STREAMS.items():
                    raw[mode][streams].append(bench(streams, requests, f"{mode} round {number}"))
        for streams, rate in transformers_rates(list(STREAMS)).items():
            raw["transformers"][streams].append(rate)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return raw


def table(raw: dict[str, Any]) -> str:
    """Output tokens per second, median [min-max], one line a way."""
    lines = ["| | " + " | ".join(f"{n} streams" for n in STREAMS) + " |", "| --- |" + " --- |" * len(STREAMS)]
    for mode, by_streams in raw.items():
        cells = []
        for streams in STREAMS:
            rates = [
                value if isinstance(value, float) else value["output_tokens_per_s"] for value in by_streams[streams]
            ]
            cells.append(f"{median(rates):.1f} [{min(rates):.1f}-{max(rates):.1f}]")
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = run(arguments.rounds)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "machine": _processor()}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        report = {**facts, "commit": commit.stdout.strip(), "rounds": arguments.rounds, "raw": raw}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(raw))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
