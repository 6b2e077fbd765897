"""Fault points: nothing without the variable, exact with it, and never in a server that asks for keys."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import faultpoints
from shared.config import load_settings
from shared.errors import ConfigurationError
from shared.faultpoints import ACTIONS, POINTS, VARIABLE, ArmedFaults, Fault, InjectedFault, chosen, parse

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0


def called() -> list[str]:
    """Every name `fault_point` is called with in the product."""
    text = "".join(path.read_text() for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py"))
    return re.findall(r'faultpoints\.fault_point\("([^"]+)"\)', text)


def test_every_point_is_called_once_and_every_call_is_listed() -> None:
    assert sorted(called()) == sorted(POINTS)


def test_without_the_variable_nothing_is_bound() -> None:
    assert chosen({}) is chosen({VARIABLE: ""})
    assert not isinstance(chosen({}), ArmedFaults)
    chosen({})("no.such.point")
    assert not isinstance(faultpoints.fault_point, ArmedFaults)


def test_a_list_is_read() -> None:
    assert parse("decode.committed:kill:3, prefill.offered:stop") == (
        Fault("decode.committed", "kill", 3),
        Fault("prefill.offered", "stop", 1),
    )
    assert parse("") == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere:kill", "nowhere"),
        ("engine.step:explode", "explode"),
        ("engine.step", "''"),
        ("engine.step:kill:0", "'0'"),
        ("engine.step:kill:x", "'x'"),
    ],
)
def test_a_wrong_list_is_told(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parse(text)


def test_the_count_says_which_pass_acts() -> None:
    armed = ArmedFaults("engine.step:raise:3")
    armed("engine.step")
    armed("decode.taken")
    armed("engine.step")
    with pytest.raises(InjectedFault):
        armed("engine.step")
    armed("engine.step")


def test_a_file_arms_a_running_process(tmp_path: Path) -> None:
    points = tmp_path / "points"
    armed = ArmedFaults(f"@{points}")
    armed("engine.step")
    points.write_text("engine.step:raise:2")
    armed("engine.step")
    with pytest.raises(InjectedFault):
        armed("engine.step")
    points.write_text("")
    armed("engine.step")


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_kill_and_stop_hit_the_process_itself(action: str, number: signal.Signals) -> None:
    program = "from shared.faultpoints import fault_point; fault_point('engine.step'); print('went on')"
    environment = {**os.environ, VARIABLE: f"engine.step:{action}"}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + DEADLINE_S
    status = 0
    while not status and time.monotonic() < deadline:
        _, status = os.waitpid(process.pid, os.WNOHANG | os.WUNTRACED)
        time.sleep(0.01)
    if os.WIFSTOPPED(status):
        assert os.WSTOPSIG(status) == number
        process.kill()
        assert process.communicate()[0] == b""
        return
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == -number
    assert process.communicate()[0] == b""


def test_every_action_is_one_of_four() -> None:
    assert set(ACTIONS) == {"kill", "stop", "hang", "raise"}


def test_a_server_with_keys_refuses_to_start_with_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine.step:kill")
    assert load_settings(api_keys=()).api_keys == ()
    with pytest.raises(ConfigurationError, match=VARIABLE):
        load_settings(api_keys=("a-key",))
    monkeypatch.delenv(VARIABLE)
    assert load_settings(api_keys=("a-key",)).key_values == ("a-key",)
