#!/usr/bin/env python
"""Count the CPU time that the package adds to fairseq-train, inside of the process.

Give the options of a training; the script trains with them, and prints what share of the CPU time
is the proximal steps', the counts' and the moving average's zeros. Other work on the machine
disturbs this less than a comparison of speeds. Use one thread (OMP_NUM_THREADS=1), since waiting
threads count, too.

    OMP_NUM_THREADS=1 python scripts/cpu_share.py DATA_BIN --user-dir fairseq_autosize \
        --prox l21 --arch transformer --optimizer adam ... --max-update 320 --no-save
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.trainer import Trainer
from fairseq_cli import train

from fairseq_autosize.proximal_optimizer import ProximalOptimizer
from fairseq_autosize.tasks._autosize import AutosizeMixin

WARM_UP = 20  # updates before the count begins


class Clock:
    """CPU seconds spent inside of some methods, not counted twice where they call each other."""

    def __init__(self) -> None:
        self.updates = 0
        self.start = 0.0
        self.spent = 0.0
        self._running = False

    def count(self, cls: type, name: str, running: bool) -> None:
        """Let the clock run, or stand, while a method does its work."""
        method = getattr(cls, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._switch(running)
            try:
                return method(*args, **kwargs)
            finally:
                self._switch(before)

        setattr(cls, name, timed)

    def start_after(self, updates: int) -> Callable[..., Any]:
        """Replacement for `Trainer.train_step`: forget what was before so many updates."""
        method = Trainer.train_step

        def train_step(*args: Any, **kwargs: Any) -> Any:
            if self.updates == updates:
                self.start, self.spent = time.process_time(), 0.0
            self.updates += 1
            return method(*args, **kwargs)

        return train_step

    def _switch(self, running: bool) -> bool:
        now = time.process_time()
        before, self._running = self._running, running
        self.spent += now * (before - running)
        return before


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    clock = Clock()
    clock.count(ProximalOptimizer, "step", running=True)
    clock.count(ProximalOptimizer, "_step_inner", running=False)  # fairseq's own
    for name in ("_log_counts", "_count", "_zero"):
        clock.count(AutosizeMixin, name, running=True)
    Trainer.train_step = clock.start_after(WARM_UP)
    train.cli_main()
    total = time.process_time() - clock.start
    updates = clock.updates - WARM_UP
    if updates <= 0:
        sys.exit(f"--max-update: more than {WARM_UP} updates are needed")
    result = {
        "updates": updates,
        "package_ms_per_update": round(1000 * clock.spent / updates, 3),
        "other_ms_per_update": round(1000 * (total - clock.spent) / updates, 3),
        "added_percent": round(100 * clock.spent / (total - clock.spent), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
