"""Places where tests make a process die, stand still, hang or fail, at an exact state of a request.

`fault_point(name)` does nothing unless the environment variable SLIPSTREAM_FAULT_POINTS was set when this module was
imported. Its value is a list `name:action[:count]` with commas between, or `@file` for a file that holds such a list:
the file may be written at any time, and counting begins anew whenever it changes. `count` is the call that acts, 1 if
left out. Settings with API keys refuse to load while it is set: no server that asks for keys can be made to die by it.

Call it as `faultpoints.fault_point(...)`, so that a test in the same process can put a function of its own there.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError

VARIABLE = "SLIPSTREAM_FAULT_POINTS"

POINTS = (
    "prefill.begun",
    "prefill.blocks_allocated",
    "prefill.offered",
    "prefill.chunk_exported",
    "prefill.first_token_appended",
    "prefill.final_frame",
    "prefill.acknowledged",
    "decode.taken",
    "decode.reserved",
    "decode.frame_landed",
    "decode.verified",
    "decode.committed",
    "decode.appended",
    "decode.ending",
    "engine.step",
    "gateway.submitted",
    "gateway.first_event",
)
"""Every state that has a point, in the order a request passes them."""

_HANG_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the `count`-th pass of a point."""

    point: str
    action: str
    count: int


def parse(text: str) -> tuple[Fault, ...]:
    """Read `name:action[:count],...`. Raises ConfigurationError that lists what there is."""
    return tuple(_parse_one(part.strip()) for part in text.split(",") if part.strip())


def _parse_one(text: str) -> Fault:
    point, _, rest = text.partition(":")
    action, _, count = rest.partition(":")
    if point not in POINTS:
        raise ConfigurationError(f"{VARIABLE} names no fault point {point!r}; there are {', '.join(POINTS)}")
    if action not in ACTIONS:
        raise ConfigurationError(f"{VARIABLE} knows no action {action!r}; there are {', '.join(ACTIONS)}")
    if not (count or "1").isdecimal() or int(count or 1) < 1:
        raise ConfigurationError(f"{VARIABLE} has a count {count!r}; it must be a number from 1 on")
    return Fault(point, action, int(count or 1))


class InjectedFault(Exception):
    """What the action `raise` raises."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    time.sleep(_HANG_S)


def _raise() -> None:
    raise InjectedFault("a fault point raised")


ACTIONS: Mapping[str, Callable[[], None]] = {"kill": _kill, "stop": _stop, "hang": _hang, "raise": _raise}


class ArmedFaults:
    """Counts passes and acts. `source` is the variable's value."""

    def __init__(self, source: str) -> None:
        self._file = Path(source[1:]) if source.startswith("@") else None
        self._version: object = None
        self._passes: Counter[str] = Counter()
        self._faults = () if self._file is not None else parse(source)

    def __call__(self, name: str) -> None:
        self._reload()
        self._passes[name] += 1
        for fault in self._faults:
            if fault.point == name and fault.count == self._passes[name]:
                ACTIONS[fault.action]()

    def _reload(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            if version != self._version:
                faults = parse(self._file.read_text())
                self._version, self._faults = version, faults
                self._passes.clear()
        except OSError:
            self._version, self._faults = None, ()


def _nothing(name: str) -> None:
    """No fault is asked for."""


def chosen(environment: Mapping[str, str]) -> Callable[[str], None]:
    """The function `fault_point` is in a process with this environment."""
    source = environment.get(VARIABLE, "")
    return ArmedFaults(source) if source else _nothing


fault_point: Callable[[str], None] = chosen(os.environ)


def refuse_with_keys(has_keys: bool) -> None:
    """Raises ConfigurationError when faults are asked for in a server that asks its clients for keys."""
    if has_keys and os.environ.get(VARIABLE):
        raise ConfigurationError(f"{VARIABLE} is for tests only: unset it, or configure no API keys")
