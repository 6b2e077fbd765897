"""The collector's settings, in a process of their own: they hold for all of it."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import gc
from shared.garbage import NEW_OBJECTS, collect_garbage_rarely
loaded = [[] for _ in range(1000)]
collect_garbage_rarely()
assert gc.get_freeze_count() >= 1000
assert gc.get_threshold()[0] == NEW_OBJECTS
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() == 1  # what is made later is still collected
"""


def test_what_was_loaded_is_left_alone_and_later_garbage_is_collected() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True, timeout=60)
