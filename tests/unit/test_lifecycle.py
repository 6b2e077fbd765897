"""How processes start and stop: exit status, signals, tasks that do not want to end, children of a dead parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from shared.errors import ConfigurationError, SlipstreamError
from shared.lifecycle import EXIT_FAILED, EXIT_OK, PARENT_VARIABLE, flatten, run_service
from shared.tasks import end_tasks, heed_cancellation

WAIT_S = 15.0
HEAD = (
    "import asyncio, os, sys\nfrom shared.errors import ConfigurationError\nfrom shared.lifecycle import run_service\n"
)


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    """A child that runs `program` and whose output can be read."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", HEAD + program]
    return subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


SERVE = """
async def main(stop):
    print("serving", flush=True)
    await stop.wait()
    print("draining", flush=True)
    {after}
sys.exit(run_service(main))
"""


def serving(after: str = "") -> subprocess.Popen[str]:
    child = start(SERVE.format(after=after))
    assert child.stdout is not None
    assert child.stdout.readline() == "serving\n"
    return child


def test_a_signal_after_a_drain_by_order_is_still_a_polite_one() -> None:
    child = start("""
async def main(stop):
    stop.set()
    print("draining", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("done", flush=True)
sys.exit(run_service(main))
""")
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "draining\n"
    child.send_signal(signal.SIGTERM)
    child.stdin.write("go on\n")
    child.stdin.flush()
    out, _ = child.communicate(timeout=WAIT_S)
    assert (out, child.returncode) == ("done\n", EXIT_OK)


def test_giving_up_ends_the_process_whatever_hangs_in_it() -> None:
    child = start("""
import threading
from shared.lifecycle import give_up
async def main(stop):
    threading.Thread(target=threading.Event().wait).start()
    give_up("the engine made no turn for 60 s")
sys.exit(run_service(main))
""")
    out, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == EXIT_FAILED
    assert "the engine made no turn for 60 s" in out + err


# --- end_tasks --------------------------------------------------------------------------------------------------------


async def test_tasks_are_cancelled_and_waited_for() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(3)]
    await asyncio.sleep(0)
    await end_tasks(tasks)
    assert sorted(ended) == [0, 1, 2]
    assert all(task.cancelled() for task in tasks)


async def test_a_task_that_swallows_one_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.tasks._CANCEL_AGAIN_S", 0.01)
    swallowed: list[bool] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.append(True)
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await end_tasks([task])
    assert swallowed == [True]
    assert task.cancelled()


async def test_ended_tasks_and_no_tasks_are_fine() -> None:
    async def nothing() -> None:
        return

    task = asyncio.create_task(nothing())
    await task
    await end_tasks([task])
    await end_tasks([])
    assert not task.cancelled()


async def test_a_loop_in_a_task_group_heeds_a_cancellation_that_was_swallowed() -> None:
    """A group cancels its children once; cancelling the group again does not reach them."""
    turns: list[int] = []

    async def loop() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                turns.append(len(turns))
            heed_cancellation()

    async def service() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(loop())

    task = asyncio.create_task(service())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await end_tasks([task])
    assert turns == [0]
    heed_cancellation()  # of a task that nobody cancels: nothing happens


# --- exit status ------------------------------------------------------------------------------------------------------


def test_a_service_that_returns_exits_with_0() -> None:
    async def main(stop: asyncio.Event) -> None:
        assert not stop.is_set()

    assert run_service(main) == EXIT_OK


@pytest.mark.parametrize("is_nested", [False, True])
def test_an_expected_error_is_one_line_without_a_traceback(is_nested: bool, capfd: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise ConfigurationError("the sky is too low; raise it")

    async def main(stop: asyncio.Event) -> None:
        if not is_nested:
            await fail()
        async with asyncio.TaskGroup() as outer:
            outer.create_task(fail())

    assert run_service(main) == EXIT_FAILED
    captured = capfd.readouterr()
    told = captured.out + captured.err
    assert told.count("the sky is too low; raise it") == 1
    assert "configuration_error" in told
    assert "Traceback" not in told


def test_an_unexpected_error_keeps_its_traceback() -> None:
    child = start("async def main(stop): raise KeyError('a bug')\nsys.exit(run_service(main))")
    _, told = child.communicate(timeout=WAIT_S)
    assert child.returncode == 1
    assert "Traceback" in told
    assert "a bug" in told


def test_an_expected_error_in_a_process_exits_with_1() -> None:
    child = start("async def main(stop): raise ConfigurationError('a sentence')\nsys.exit(run_service(main))")
    out, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == EXIT_FAILED
    assert "a sentence" in out + err
    assert "Traceback" not in out + err


def test_flatten_finds_every_leaf() -> None:
    one, two, three = SlipstreamError("1"), SlipstreamError("2"), SlipstreamError("3")
    group = ExceptionGroup("a", [one, ExceptionGroup("b", [two, ExceptionGroup("c", [three])])])
    assert flatten(group) == [one, two, three]


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(number: signal.Signals) -> None:
    child = serving()
    child.send_signal(number)
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out, err) == (EXIT_OK, "draining\n", "")


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = serving("await asyncio.sleep(60)")
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None
    assert child.stdout.readline() == "draining\n"
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=WAIT_S)
    assert child.returncode == 128 + signal.SIGINT


def test_sigusr1_says_where_every_task_waits() -> None:
    child = serving()
    child.send_signal(signal.SIGUSR1)
    assert child.stderr is not None
    first = child.stderr.readline()
    assert "Stack for" in first
    assert "_supervised" in first
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=WAIT_S)
    assert child.returncode == EXIT_OK


# --- a parent that dies -----------------------------------------------------------------------------------------------

CHILD = """
async def main(stop):
    print(os.getpid(), flush=True)
    await stop.wait()
sys.exit(run_service(main))
"""

PARENT = f"""
import subprocess
variables = os.environ | {{"{PARENT_VARIABLE}": str(os.getpid())}}
child = subprocess.Popen([sys.executable, "-c", {HEAD + CHILD!r}], env=variables)
child.wait()
"""


def is_gone(pid: int) -> bool:
    """Whether the process is no more, or only waits to be reaped by whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = start(PARENT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    parent.kill()
    parent.communicate(timeout=WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not is_gone(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    child = start(CHILD, **{PARENT_VARIABLE: "1"})
    out, _ = child.communicate(timeout=WAIT_S)
    assert child.returncode == EXIT_FAILED
    assert out == ""
