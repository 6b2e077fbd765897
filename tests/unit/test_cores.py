"""Workers of one machine divide its cores while they compute at the same time."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from shared.cores import VARIABLE, CoreBoard, CoreShare, core_share
from shared.engine.runner import place_of
from tests.native_models import library


@pytest.fixture
def board() -> Iterator[CoreBoard]:
    board = CoreBoard.create()
    yield board
    board.close()


def test_who_computes_alone_has_every_core(board: CoreBoard) -> None:
    assert CoreShare(board, slot=3, num_cores=8).cores(time.monotonic_ns()) == range(8)


@pytest.mark.parametrize(
    ("num_cores", "shares"),
    [
        (2, [[0], [1]]),
        (3, [[0, 1], [2]]),
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (8, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (2, [[0], [1], [0]]),
        (1, [[0], [0]]),
    ],
)
def test_those_who_compute_share_equally_and_lower_slots_take_what_is_left(
    board: CoreBoard, num_cores: int, shares: list[list[int]]
) -> None:
    workers = [CoreShare(board, slot, num_cores) for slot in range(len(shares))]
    with ExitStack() as steps:
        for worker in workers:
            steps.enter_context(worker.step())
        assert [list(worker.cores(time.monotonic_ns())) for worker in workers] == shares


def test_the_pause_between_two_steps_counts_and_a_longer_one_does_not(board: CoreBoard) -> None:
    busy, other = CoreShare(board, 0, 4), CoreShare(board, 1, 4)
    with busy.step():
        pass
    ended = int(board.words[0])
    assert len(other.cores(ended + 1_000_000)) == 2
    assert len(other.cores(ended + 10_000_000)) == 4


def test_a_step_that_raises_ends(board: CoreBoard) -> None:
    share, other = CoreShare(board, 0, 4), CoreShare(board, 1, 4)
    with pytest.raises(RuntimeError, match="broken"), share.step():
        raise RuntimeError("broken")
    assert len(other.cores(time.monotonic_ns() + 10_000_000)) == 4


def test_a_child_in_a_step_is_seen_and_forgotten_when_it_was_killed(board: CoreBoard) -> None:
    code = """
import sys, time
from shared.cores import core_share
share = core_share()
assert share
with share.step():
    print("computing", flush=True)
    time.sleep(600)
"""
    fd = board.descriptor
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={VARIABLE: f"{fd}:0"}, pass_fds=(fd,), stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"computing\n"
        share = CoreShare(board, 1, 4)
        assert len(share.cores(time.monotonic_ns())) == 2
        child.kill()
    board.clear(0)
    assert len(share.cores(time.monotonic_ns())) == 4


def test_without_a_parent_that_shares_a_worker_uses_all_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert core_share() is None


def test_the_kernels_count_alike(board: CoreBoard) -> None:
    rng, now = random.Random(7), 10**15
    for _ in range(500):
        board.words[:] = 0
        for slot in rng.sample(range(len(board.words)), rng.randrange(12)):
            board.words[slot] = rng.choice([0, (1 << 64) - 1, now - rng.randrange(12_000_000), now])
        share = CoreShare(board, rng.randrange(len(board.words)), rng.randrange(1, 40))
        assert library().share(place_of(share), now) == share.cores(now)
