"""Figures of a run: a table for people, and everything for the raw file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from tests.faults import invariants
from tests.faults.campaign import Campaign, Disturbance
from tests.faults.client import FAILED, FINISHED, LEFT, Record


def recovery_times(records: Iterable[Record], disturbances: Sequence[Disturbance]) -> list[float]:
    """Seconds from a fault to the next token of each stream that changed hands because of it."""
    times = []
    for record in records:
        before, epoch = record.started, 1
        for event_id, at in record.events:
            now = int(event_id.partition("-")[0].rpartition(":")[2])
            faults = [fault.at for fault in disturbances if before <= fault.at <= at]
            if now > epoch and faults:
                times.append(at - faults[0])
            before, epoch = at, max(epoch, now)
    return times


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value below which `share` of all lie; None of nothing."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else None


def phase_row(run: Campaign, name: str) -> dict[str, Any]:
    """Success, failures and latencies of the requests that began in a phase."""
    began, ended = run.phases[name]
    records = [record for record in run.load.records if began <= record.started <= ended]
    done = [record for record in records if record.outcome == FINISHED]
    first = [record.first_event_s for record in done if record.first_event_s is not None]
    whole = [record.ended - record.started for record in done]
    return {
        "phase": name,
        "seconds": round(ended - began, 1),
        "requests": len(records),
        "finished": len(done),
        "left": sum(record.outcome == LEFT for record in records),
        "failed": sum(record.outcome == FAILED for record in records),
        "refused_then_done": sum(bool(record.refusals) for record in done),
        "resumes": sum(record.resumes for record in records),
        "tokens": sum(len(choice.tokens) for record in records for choice in record.answer.values()),
        "ttft_p50_s": percentile(first, 0.5),
        "ttft_p99_s": percentile(first, 0.99),
        "latency_p50_s": percentile(whole, 0.5),
        "latency_p99_s": percentile(whole, 0.99),
    }


def result(run: Campaign) -> dict[str, Any]:
    """What goes into the raw file for one cluster."""
    recovered = recovery_times(run.load.records, run.disturbances)
    integrity = invariants.token_integrity(run.load.records, run.load.references)
    return {
        "seed": run.plan.seed,
        "topology": asdict(run.plan.topology),
        "concurrency": run.plan.concurrency,
        "phases": [phase_row(run, name) for name in run.phases],
        "faults": [
            {**asdict(fault), "at": round(fault.at - run.started, 3), "healed": round(fault.healed - run.started, 3)}
            for fault in run.disturbances
        ],
        "respawns": run.cluster.respawns,
        "failed_requests": sum(record.outcome == FAILED for record in run.load.records),
        "failures": [failure(run, record) for record in run.load.records if record.outcome == FAILED][:20],
        "dead_letters": run.dead_letters,
        **{f"tokens_{kind}": sum(kind in line for line in integrity) for kind in ("lost", "doubled", "reordered")},
        "answers_different": len(integrity),
        "leaked_kv_tokens": run.leaked_tokens,
        "moved_streams": len(recovered),
        "resumed_streams": sum(record.resumes > 0 and record.spec.stream for record in run.load.records),
        "recovery_p50_s": percentile(recovered, 0.5),
        "recovery_p99_s": percentile(recovered, 0.99),
        "recovery_s": [round(seconds, 3) for seconds in sorted(recovered)],
        "memory_kib_per_1000_requests": {
            f"{trace.name} {trace.pid}": round(growth, 1)
            for trace in run.memory.values()
            if (growth := trace.kib_per_1000_requests()) is not None
        },
        "violations": run.violations,
    }


def failure(run: Campaign, record: Record) -> dict[str, Any]:
    """What is worth knowing of a request that failed: what it was, when its epochs began, when it ended."""
    epochs: dict[str, float] = {}
    for event_id, at in record.events:
        epochs.setdefault(event_id.partition("-")[0], round(at - run.started, 3))
    shown = {name: value for name, value in record.spec.body.items() if name not in ("prompt", "messages")}
    times = {"started": round(record.started - run.started, 3), "ended": round(record.ended - run.started, 3)}
    return {"request": shown, "error": record.error, "epochs": epochs, **times}


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """A line for each phase of each run, then what was violated."""
    counts = ("phase", "requests", "finished", "left", "failed", "resumes")
    columns = (*counts, "ttft_p50_s", "ttft_p99_s", "latency_p50_s", "latency_p99_s")
    print(" ".join(f"{name:>14}" for name in ("seed", *columns)))
    for one in results:
        for row in one["phases"]:
            print(" ".join(f"{value!s:>14}" for value in (one["seed"], *(row[name] for name in columns))))
    for one in results:
        print(
            f"seed {one['seed']}: {len(one['faults'])} faults, {one['failed_requests']} requests failed, "
            f"{one['tokens_lost']} lost, {one['tokens_doubled']} doubled, {one['tokens_reordered']} reordered, "
            f"{one['leaked_kv_tokens']} KV tokens leaked, {one['moved_streams']} streams moved, "
            f"{one['resumed_streams']} resumed, "
            f"recovery p50 {one['recovery_p50_s']} s p99 {one['recovery_p99_s']} s"
        )
        for violation in one["violations"]:
            print(f"  VIOLATED (seed {one['seed']}): {violation}")
