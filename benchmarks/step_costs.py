"""Where the processor time of a token goes: the model, the Python around it, the event loop, the bus, the gateway.

    python -m benchmarks.step_costs --out docs/data/step-costs.json

For each number of streams a fresh `slipstream serve` is loaded by `slipstream bench`, and the kernel's count of each
thread's running time is read before and after. Threads are told apart by process and name. The engine's thread computes
as well as it plans: the decode worker says at its end how much of it was the model's. Microseconds of one core per
output token; what is not the model's is what a token costs beside its arithmetic. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.raw import write_raw
from benchmarks.server import slipstream
from shared.engine.thread import NAME as ENGINE_THREAD

STREAMS = {1: 6, 8: 32, 32: 96}
"""Streams at once, and requests measured."""

COMPUTE_THREAD = "sl-compute"
PROMPT_LEN, OUTPUT_LEN = 64, 128
PORT = 8972
MODEL, ENGINE, LOOP, OTHER = "model", "engine thread's Python", "event loop", "other threads"
ROLES = {"prefill": "prefill", "decode": "decode", "gateway": "gateway", "valkey-server": "bus"}

Kind = tuple[str, str]
"""(process, part of it)"""


@dataclass(frozen=True, slots=True)
class Served:
    """A running `slipstream serve`; its log tells what the engine's threads did, once it has stopped."""

    url: str
    process: psutil.Process
    log: Path

    def snapshot(self) -> Counter[Kind]:
        """Nanoseconds each kind of thread has run so far."""
        spent: Counter[Kind] = Counter()
        for process in (self.process, *self.process.children(recursive=True)):
            role = role_of(process.cmdline())
            for folder in Path(f"/proc/{process.pid}/task").iterdir():
                with suppress(OSError):  # a thread that has just ended
                    name = (folder / "comm").read_text().strip()
                    ran = int((folder / "schedstat").read_text().split()[0])
                    spent[role, part_of(role, name, is_main=folder.name == str(process.pid))] += ran
        return spent

    def roles(self) -> dict[int, str]:
        """Process id → role, while they run."""
        return {process.pid: role_of(process.cmdline()) for process in self.process.children(recursive=True)}

    def engine_shares(self, roles: dict[int, str]) -> dict[str, float]:
        """Role → share of its engine thread's time that was the model's, over the worker's whole life."""
        shares = {}
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):  # what `serve` says in words
                entry = json.loads(line)
                if entry.get("event") == "engine_stopped":
                    shares[roles[entry["pid"]]] = entry["model_s"] / max(entry["thread_s"], 1e-9)
        return shares


def role_of(command: list[str]) -> str:
    """Which process of the stack a command line is; what is none of them is `serve` itself."""
    words = {Path(word).name for word in command[:4]}
    return next((role for word, role in ROLES.items() if word in words), "serve")


def part_of(role: str, thread: str, *, is_main: bool) -> str:
    """The kind of work a thread does, `ENGINE` with the model in it; only workers have more than one."""
    if role not in ("prefill", "decode"):
        return "all"
    if is_main:
        return LOOP
    return {ENGINE_THREAD: ENGINE, COMPUTE_THREAD: MODEL}.get(thread, OTHER)


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """A running `slipstream serve smollm2`, drained at the end."""
    log = folder / "serve.log"
    with slipstream("smollm2", "--log-level", "info").running(PORT, log) as process:
        yield Served(f"http://127.0.0.1:{PORT}", psutil.Process(process.pid), log)


def load(url: str, streams: int, requests: int) -> tuple[dict[str, Any], float]:
    """One `slipstream bench --json` run, and the processor seconds it took itself."""
    command = [sys.executable, "-m", "services.cli", "bench", "--json", "--base-url", url, "--warmup", "0"]
    command += ["--concurrency", str(streams), "--requests", str(requests)]
    command += ["--prompt-len", str(PROMPT_LEN), "--output-len", str(OUTPUT_LEN)]
    before = _children_s()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(result.stdout)
    return report, _children_s() - before


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def divided(spent: Counter[Kind], shares: dict[str, float]) -> Counter[Kind]:
    """The engine threads' time as the model's and their own."""
    parts = Counter(spent)
    for role, share in shares.items():
        computed = round(spent[role, ENGINE] * share)
        parts[role, MODEL] += computed
        parts[role, ENGINE] -= computed
    return parts


def measure(streams: int, requests: int) -> dict[str, Any]:
    """Core-microseconds per output token by process and part, and the rate they were measured at."""
    with tempfile.TemporaryDirectory() as folder:
        with served(Path(folder)) as stack:
            load(stack.url, streams, max(2, streams))
            before = stack.snapshot()
            report, client_s = load(stack.url, streams, requests)
            spent = stack.snapshot() - before
            roles = stack.roles()
        parts = divided(spent, stack.engine_shares(roles))
    tokens = requests * OUTPUT_LEN
    costs = {f"{role}: {part}": round(parts[role, part] / tokens / 1000, 1) for role, part in sorted(parts)}
    outside = sum(cost for name, cost in costs.items() if not name.endswith(f": {MODEL}"))
    return {
        "streams": streams,
        "output_tokens_per_s": report["output_tokens_per_s"],
        "core_us_per_token": costs,
        "outside_the_model": round(outside, 1),
        "load client": round(client_s / tokens * 1e6, 1),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """One line a part, one column a number of streams."""
    names = sorted({name for run in runs for name in run["core_us_per_token"]})
    rows = [[name, *(run["core_us_per_token"].get(name, 0.0) for run in runs)] for name in names]
    rows.append(["**outside the model**", *(run["outside_the_model"] for run in runs)])
    rows.append(["load client", *(run["load client"] for run in runs)])
    rows.append(["output tokens per second", *(run["output_tokens_per_s"] for run in runs)])
    head = ["core-µs per output token", *(f"{run['streams']} streams" for run in runs)]
    lines = [head, ["---"] * len(head), *([row[0], *(f"{value:.0f}" for value in row[1:])] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, nargs="*", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = [measure(streams, STREAMS[streams]) for streams in arguments.streams]
    write_raw(arguments.out, runs)
    print(table(runs))


if __name__ == "__main__":
    main()
