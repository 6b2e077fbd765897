"""How often Python looks for garbage in a process that serves."""

from __future__ import annotations

import gc

NEW_OBJECTS = 20_000
"""Objects made and not let go of before the collector looks at them; Python's own limit is 700."""


def collect_garbage_rarely() -> None:
    """Leave what was loaded at start out of every collection, and wait for more objects before each.

    A running answer keeps objects for every token it was given. With Python's own limit the collector looks at them
    again and again, and at hundreds of thousands more, to find that none is garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
