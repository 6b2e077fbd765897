"""The CPU kernels alone, and what a step costs as the work grows.

    python -m benchmarks.kernels --out docs/data/kernels.json

Products of one layer-sized matrix by kind and row count against torch's, alternating; whole steps of a model over batch
size and context; laying out and scheduling a step over the number of sequences. Every figure is the best of many, in
one process with the threads given.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.raw import write_raw
from shared.cores import CoreBoard, CoreShare
from shared.engine.batch import build_step
from shared.engine.draws import plan_draws
from shared.engine.runner import place_of
from shared.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from shared.engine.sequence import Sequence
from shared.kernels.library import CCores, CLayer, CMatrix, CModel, Library, load_library
from shared.kernels.packing import Matrix, dense, pack, quantise_4bit, quantise_8bit
from shared.kv.block_manager import BlockManager
from shared.kv.layout import KVLayout
from shared.model.layers import make_linear
from shared.model.native import NativeDecoder
from shared.model.registry import load_native
from shared.model.source import resolve
from shared.protocol.sampling import SamplingParams

NUM_OUT, NUM_IN = 1536, 576
ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
SEQUENCES = (1, 8, 64, 256, 1024, 2048)
BLOCK_SIZE = 16
SETTLE_S = 0.05
MEASURE_S, MIN_CALLS = 0.4, 3
"""Before each measurement: torch's threads go on spinning after a product and would disturb the next one."""


def best_of(work: Callable[[], object]) -> float:
    """Seconds of the fastest call within a while: long enough for the system to give each thread a core."""
    time.sleep(SETTLE_S)
    work()
    times: list[float] = []
    until = time.perf_counter() + MEASURE_S
    while len(times) < MIN_CALLS or time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def products(library: Library, threads: int) -> list[dict[str, Any]]:
    """GMAC/s of each kind of matrix, and of torch's float32 product."""
    weights = np.random.default_rng(0).standard_normal((NUM_OUT, NUM_IN)).astype(np.float32)
    ways: dict[str, Matrix] = {
        "4 bits": quantise_4bit(weights),
        "8 bits": quantise_8bit(weights),
        "float32": dense(weights),
    }
    packed = {name: pack(matrix) for name, matrix in ways.items()}
    model = CModel(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, hidden_size=32, vocab_size=16)
    layers = (CLayer * 1)()
    model.layers = ctypes.cast(layers, ctypes.POINTER(CLayer))
    engine = library.create(model, threads, library.best_isa)
    linear, plain = make_linear(torch.from_numpy(weights), None), torch.from_numpy(weights)
    found = []
    for count in ROWS:
        rows = np.random.default_rng(count).standard_normal((count, NUM_IN)).astype(np.float32)
        out = np.empty((count, NUM_OUT), dtype=np.float32)
        line: dict[str, Any] = {"rows": count}
        macs = count * NUM_OUT * NUM_IN
        for name, matrix in ways.items():
            struct = CMatrix(int(matrix.kind), NUM_OUT, NUM_IN, packed[name].ctypes.data, None)
            seconds = best_of(lambda: library.matmul(engine, struct, rows.ctypes.data, count, out.ctypes.data))  # noqa: B023
            line[name] = macs / seconds / 1e9
        tensor = torch.from_numpy(rows)
        line["torch, packed float32"] = macs / best_of(lambda: linear(tensor)) / 1e9  # noqa: B023
        line["torch, F.linear"] = macs / best_of(lambda: F.linear(tensor, plain)) / 1e9  # noqa: B023
        found.append(line)
    library.destroy(engine)
    return found


def planned(batch: int, context: int, new: int = 1) -> list[Scheduled]:
    """Sequences of `context` tokens in the cache and `new` more to compute, in blocks of their own."""
    each = -(-(context + new) // BLOCK_SIZE)
    plan = []
    for index in range(batch):
        tokens = [7 + (index + at) % 4000 for at in range(context + new)]
        sequence = Sequence(f"r{index}", SamplingParams(64, 1, temperature=0.0), tokens, 8, (0,), b"bench")
        sequence.block_ids = list(range(1 + index * each, 1 + (index + 1) * each))
        sequence.num_computed = context
        plan.append(Scheduled(sequence, new))
    return plan


def step_seconds(decoder: NativeDecoder, cores: CCores, plan: list[Scheduled]) -> float:
    config = decoder.config
    num_blocks = 1 + sum(len(item.sequence.block_ids) for item in plan)
    shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    kv = torch.zeros(shape, dtype=torch.bfloat16)
    step, draws = build_step(plan, BLOCK_SIZE), plan_draws(plan)
    return best_of(lambda: decoder.run(step, kv, draws, cores=cores))


def steps(decoder: NativeDecoder) -> dict[str, list[dict[str, float]]]:
    """Decode steps over batch and context, prefill over its length."""
    share = CoreShare(CoreBoard.create(), 0, len(os.sched_getaffinity(0)))  # alone: as `serve` would place the threads
    cores = place_of(share)
    by_batch = []
    for batch in ROWS:
        seconds = step_seconds(decoder, cores, planned(batch, 192))
        by_batch.append({"batch": batch, "ms": 1e3 * seconds, "tokens_per_s": batch / seconds})
    longest = decoder.config.max_position
    by_context = []
    for context in (min(length, longest - 1) for length in CONTEXTS):
        seconds = step_seconds(decoder, cores, planned(1, context))
        by_context.append({"context": context, "ms": 1e3 * seconds})
    by_prompt = []
    for length in (64, 512, 2048):
        seconds = step_seconds(decoder, cores, planned(1, 0, length))
        by_prompt.append({"prompt": length, "ms": 1e3 * seconds, "tokens_per_s": length / seconds})
    return {"batch_at_context_192": by_batch, "context_at_batch_1": by_context, "prefill": by_prompt}


def scheduling() -> list[dict[str, float]]:
    """Microseconds to plan a decode step and to lay it out, all sequences running."""
    found = []
    for count in SEQUENCES:
        blocks = BlockManager(1 + 2 * count)
        limits = SchedulerLimits(max_num_seqs=count, max_num_batched_tokens=max(16, count))
        scheduler = Scheduler(limits, blocks, BLOCK_SIZE, prefix_caching=False)
        for item in planned(count, 8):
            item.sequence.block_ids = blocks.allocate(1)
            scheduler.start(item.sequence)
        blocks.take_fresh()
        plan = scheduler.schedule()
        found.append(
            {
                "sequences": count,
                "schedule_us": 1e6 * best_of(scheduler.schedule),
                "layout_us": 1e6 * best_of(lambda: (build_step(plan, BLOCK_SIZE), plan_draws(plan))),  # noqa: B023
            }
        )
    return found


def _resident_mib() -> dict[str, float]:
    """Memory of this process now and at most, the interpreter and its libraries included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        name: int(fields[key].split()[0]) / 1024 for name, key in (("resident_mib", "VmRSS"), ("peak_mib", "VmHWM"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    library = load_library()
    if library is None:
        sys.exit("The native kernels were not built; install Slipstream where there is a C++ compiler.")
    torch.set_num_threads(options.threads)
    source = resolve(options.model)
    config = source.config
    layout = KVLayout(
        config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "bfloat16", k_transposed=True
    )
    begun = time.perf_counter()
    decoder = load_native(source, library, layout, options.threads)
    loading = {"seconds": time.perf_counter() - begun, **_resident_mib()}
    result: dict[str, Any] = {
        "loading": loading,
        "products_gmac_per_s": products(library, options.threads),
        "steps": steps(decoder),
        "scheduling": scheduling(),
    }
    for name, part in result.items():
        print(name, part, sep="\n")
    write_raw(options.out, [result], model=source.name, threads=options.threads, isa=library.best_isa.name.lower())


if __name__ == "__main__":
    main()
