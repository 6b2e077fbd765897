"""How many threads compute a step changes no bit, and those that are not asked for sleep on."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cores import CoreBoard, CoreShare
from shared.engine.batch import build_step
from shared.engine.draws import plan_draws
from shared.engine.runner import place_of
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.kernels.library import CCores
from shared.model.native import NativeDecoder
from shared.protocol.sampling import SamplingParams
from tests.model_checkpoints import random_model, tokens
from tests.native_models import isas, native

BLOCKS_EACH = 20
LENGTHS = (3, 40, 290)
TASKS = Path("/proc/self/task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("LlamaForCausalLM", heads=6, kv_heads=2, hidden_size=96, head_dim=16).save_pretrained(path)
    return path


def planned(num_new: int) -> list[Scheduled]:
    """Sequences of unlike lengths, each with up to `num_new` tokens still to compute."""
    plan = []
    for index, length in enumerate(LENGTHS):
        ids = tokens(length, seed=index)
        sequence = Sequence(f"r{index}", SamplingParams(8, index, temperature=1.0), ids, 1, (0,), b"root")
        sequence.block_ids = list(range(1 + BLOCKS_EACH * index, 1 + BLOCKS_EACH * (index + 1)))
        sequence.num_computed = max(0, length - num_new)
        plan.append(Scheduled(sequence, length - sequence.num_computed))
    return plan


def computed(decoder: NativeDecoder, thread_counts: list[int], cores: CCores | None = None) -> list[bytes]:
    """Everything some steps over one cache give, the prompts first and then the last token of each again and again."""
    config = decoder.config
    shape = (config.num_layers, 1 + BLOCKS_EACH * len(LENGTHS), 2, config.num_kv_heads, 16, config.head_dim)
    kv = torch.zeros(shape)
    found = []
    for index, threads in enumerate(thread_counts):
        plan = planned(1 if index else max(LENGTHS))
        logits, sampled, _ = decoder.run(build_step(plan, 16), kv, plan_draws(plan), threads=threads, cores=cores)
        found += [logits.tobytes(), sampled.tobytes(), kv.numpy().tobytes()]
    return found


def test_a_share_that_changes_within_steps_changes_no_bit(folder: Path) -> None:
    board, stop = CoreBoard.create(), threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            board.words[0] = 0 if board.words[0] else (1 << 64) - 1

    share = place_of(CoreShare(board, 1, 4))
    with ThreadPoolExecutor(2) as pool:  # a thread that computes is put on a core and stays there
        pool.submit(come_and_go)
        try:
            found = pool.submit(lambda: computed(native(folder, threads=4), [0] * 12, share)).result()
        finally:
            stop.set()
    board.close()
    assert found == computed(native(folder), [0] * 12)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_thread_counts_of_steps_change_no_bit(quantization: str | None, folder: Path) -> None:
    wanted = computed(native(folder, quantization=quantization), [1] * 8)
    for isa in isas():
        decoder = native(folder, isa=isa, threads=4, quantization=quantization)
        assert computed(decoder, [0, 1, 4, 2, 3, 1, 9, 2]) == wanted
        assert computed(decoder, [1, 4, 1, 3, 2, 2, 0, 4]) == wanted


def test_many_changes_of_the_thread_count(folder: Path) -> None:
    decoder = native(folder, threads=7)
    counts = [int(count) for count in np.random.default_rng(3).integers(0, 9, 300)]
    assert computed(decoder, counts)[-3:] == computed(native(folder), [1, 1])[-3:]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are put on cores on Linux only")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to choose from")
def test_a_thread_that_computes_two_models_is_put_where_the_share_is(folder: Path) -> None:
    """A model and its draft: what one was last placed for says nothing of where the other has put the thread."""
    usable = sorted(os.sched_getaffinity(0))
    board = CoreBoard.create()
    share = place_of(CoreShare(board, 1, len(usable)))

    def steps() -> list[int]:
        model, draft = native(folder, threads=len(usable)), native(folder, threads=len(usable))
        put = []
        for decoder, is_other_busy in ((model, True), (draft, False), (model, True), (draft, False), (draft, True)):
            board.words[0] = (1 << 64) - 1 if is_other_busy else 0
            computed(decoder, [0], share)
            put += list(os.sched_getaffinity(0))  # of this thread
        return put

    with ThreadPoolExecutor(1) as pool:  # it stays where it was put
        put = pool.submit(steps).result()
    board.close()
    beside, alone = usable[-(-len(usable) // 2)], usable[0]
    assert put == [beside, alone, beside, alone, beside]


def helpers() -> set[Path]:
    return {task for task in TASKS.iterdir() if (task / "comm").read_text().strip() == "sl-compute"}


def naps(task: Path) -> int:
    """How often a sleeping thread has gone to sleep so far; waits until it sleeps."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        if status["State"].split()[0] == "S":
            return int(status["voluntary_ctxt_switches"])
        time.sleep(0.001)
    raise AssertionError(f"{task} never sleeps")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_that_are_not_asked_for_sleep_on_and_are_named(folder: Path) -> None:
    before = helpers()
    decoder = native(folder, threads=3)
    computed(decoder, [3])
    own = sorted(helpers() - before)
    assert len(own) == 2
    asleep = [naps(task) for task in own]
    computed(decoder, [1] * 20)
    later = [naps(task) for task in own]
    assert all(now - then <= 1 for now, then in zip(later, asleep, strict=True))  # 1: still at the end of the last step
    computed(decoder, [3])
    assert all(naps(task) > count for task, count in zip(own, later, strict=True))
