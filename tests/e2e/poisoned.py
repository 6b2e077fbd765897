"""`slipstream` whose workers of the role POISONED_ROLE die of one token: it stands for a bug in a kernel."""

from __future__ import annotations

import os
import signal
import sys

POISON = 499


def poison_the_engine() -> None:
    from shared.engine.engine import Engine, Output

    healthy_step = Engine.step

    def step(self: Engine) -> list[Output]:
        if any(POISON in sequence.tokens for sequence in self.scheduler.running):
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy_step(self)

    Engine.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    from services.cli import main

    if sys.argv[1] == os.environ["POISONED_ROLE"]:
        poison_the_engine()
    main()
