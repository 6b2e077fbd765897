"""Loaded by Python at start when this folder is in PYTHONPATH: a wall clock that is wrong by CLOCK_SHIFT_S seconds."""

import os
import time

_true_time = time.time
_SHIFT_S = float(os.environ.get("CLOCK_SHIFT_S", "0"))


def _wrong_time() -> float:
    return _true_time() + _SHIFT_S


time.time = _wrong_time
