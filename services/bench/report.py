"""Figures of a run: percentiles, rates, costs; as JSON and as a table."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from services.bench.client import Sample
from services.bench.observe import ProcessMemory
from services.bench.options import BenchOptions

PERCENTILES = (50, 90, 99)
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything one run found; `as_json` is what `--json` prints.

    Times are in milliseconds by percentile ("p50", ...), None where nothing was measured.
    `second_token_ms` is the gap after the first token: where a split server's hand-off shows, as the
    first token does not wait for it. `handoff_share_of_ttft` is the mean reported hand-off time over
    the mean TTFT. `redis_per_token` counts heartbeats and idle reads of the run too.
    """

    label: str
    model: str
    mode: str
    concurrency: int
    rate: float
    seed: int
    requests: int
    errors: int
    first_error: str
    prompt_len: int
    prompt_exact: bool
    prompt_tokens_mean: float | None
    output_tokens_mean: float | None
    wall_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: dict[str, float | None]
    itl_ms: dict[str, float | None]
    second_token_ms: dict[str, float | None]
    e2e_ms: dict[str, float | None]
    chunks_per_token: float | None
    paths: dict[str, int]
    handoff_ms: dict[str, float | None]
    handoff_share_of_ttft: float | None
    kv_bytes: int
    redis_per_token: float | None
    redis_calls: dict[str, int]
    processes: list[ProcessMemory]
    machine: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.errors == 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    options: BenchOptions,
    model: str,
    prompt_exact: bool,
    samples: Sequence[Sample],
    wall: float,
    redis_calls: Mapping[str, int],
    processes: Sequence[ProcessMemory],
) -> BenchReport:
    """Fold samples into a report. Failed requests count as errors and in no other figure."""
    good = [sample for sample in samples if not sample.error]
    failed = [sample.error for sample in samples if sample.error]
    tokens = sum(sample.output_tokens for sample in good)
    handoffs = [sample.handoff_ms for sample in good if sample.handoff_ms is not None]
    ttfts = [sample.ttft for sample in good if sample.ttft is not None]
    mean_handoff, mean_ttft = _mean(handoffs), _mean(ttfts)
    return BenchReport(
        label=options.label,
        model=model,
        mode="poisson" if options.rate else "closed loop",
        concurrency=options.concurrency,
        rate=options.rate,
        seed=options.seed,
        requests=len(samples),
        errors=len(failed),
        first_error=failed[0] if failed else "",
        prompt_len=options.prompt_len,
        prompt_exact=prompt_exact,
        prompt_tokens_mean=_round(_mean([s.prompt_tokens for s in good if s.prompt_tokens is not None]), 1),
        output_tokens_mean=_round(_mean([sample.output_tokens for sample in good]), 1),
        wall_s=round(wall, 6),
        output_tokens_per_s=round(tokens / wall, 2),
        requests_per_s=round(len(good) / wall, 3),
        ttft_ms=_milliseconds(ttfts),
        itl_ms=_milliseconds([gap for sample in good for gap in sample.gaps]),
        second_token_ms=_milliseconds([sample.gaps[0] for sample in good if sample.gaps]),
        e2e_ms=_milliseconds([sample.elapsed for sample in good]),
        chunks_per_token=_ratio(sum(sample.num_chunks for sample in good), tokens),
        paths=dict(Counter(sample.path for sample in good if sample.path)),
        handoff_ms=_milliseconds([value / 1000 for value in handoffs]),
        handoff_share_of_ttft=_ratio(mean_handoff, mean_ttft * 1000)
        if mean_handoff is not None and mean_ttft is not None
        else None,
        kv_bytes=sum(sample.kv_bytes for sample in good),
        redis_per_token=_ratio(sum(redis_calls.values()), tokens) if redis_calls else None,
        redis_calls=dict(redis_calls),
        processes=list(processes),
        machine=describe_machine(),
    )


def percentile(values: Sequence[float], q: float) -> float | None:
    """The nearest-rank percentile: the smallest value that at least q per cent do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]


def describe_machine() -> dict[str, Any]:
    """What a figure means nothing without: processor, cores, memory and Python of this side."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "python": platform.python_version(),
    }


def render(report: BenchReport, console: Console) -> None:
    """Print the report for a person."""
    load = f"{report.rate:g} requests/s" if report.mode == "poisson" else f"{report.concurrency} streams"
    title = f"{report.model}: {report.mode}, {load}, {report.prompt_len} tokens in"
    figures = Table(title=title, title_justify="left")
    figures.add_column("")
    for q in PERCENTILES:
        figures.add_column(f"p{q} ms", justify="right")
    rows = {
        "time to first token": report.ttft_ms,
        "first to second token": report.second_token_ms,
        "between tokens": report.itl_ms,
        "whole request": report.e2e_ms,
        "KV hand-off": report.handoff_ms,
    }
    for name, values in rows.items():
        if any(value is not None for value in values.values()):
            figures.add_row(name, *("-" if value is None else f"{value:.1f}" for value in values.values()))
    console.print(figures)
    for line in _lines(report):
        console.print(line, highlight=False)
    if report.processes:
        console.print(_memory_table(report.processes))


def _lines(report: BenchReport) -> list[str]:
    lines = [
        f"{report.output_tokens_per_s:.1f} output tokens/s, {report.requests_per_s:.2f} requests/s, "
        f"{report.requests - report.errors} of {report.requests} requests good in {report.wall_s:.1f} s"
    ]
    if report.errors:
        lines.append(f"{report.errors} errors, the first: {report.first_error}")
    if report.paths:
        lines.append("paths: " + ", ".join(f"{path} {count}" for path, count in sorted(report.paths.items())))
    if report.handoff_share_of_ttft is not None:
        lines.append(f"hand-off: {report.handoff_share_of_ttft:.1%} of the time to first token")
    if report.redis_per_token is not None:
        most = ", ".join(f"{name} {calls}" for name, calls in list(report.redis_calls.items())[:6])
        lines.append(f"Redis: {report.redis_per_token:.2f} commands per token ({most})")
    if not report.prompt_exact:
        lines.append("the server has no /tokenize: prompts are words, so their length in tokens is not exact")
    return lines


def _memory_table(processes: Sequence[ProcessMemory]) -> Table:
    table = Table(title="memory", title_justify="left")
    for column in ("process", "pid", "peak RSS MiB", "PSS MiB"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for process in processes:
        pss = "-" if process.pss is None else f"{process.pss / MIB:.0f}"
        table.add_row(process.role, str(process.pid), f"{process.peak_rss / MIB:.0f}", pss)
    return table


def _milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{q}": _round(_times(percentile(seconds, q), 1000), 2) for q in PERCENTILES}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
