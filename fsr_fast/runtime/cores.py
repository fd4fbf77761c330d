"""How many cores other programs keep busy, which decides how many threads a training on a CPU should have."""

from __future__ import annotations

import os
import time
from pathlib import Path

TIMES = Path("/proc/stat")
SPARE = 0.3
"""Cores that other programs may take from this one before its threads notably wait for each other."""


class OtherPrograms:
    """Watches the cores on which this process may run, from its creation on; sees nothing where there is no `/proc`.

    Processes that this one has started count as other programs until they have ended.
    """

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0) if TIMES.is_file() else set[int]()
        self._began = self._read()

    def busy(self) -> float:
        """Return how many cores other programs have kept busy since the creation."""
        seconds, used, own = (now - then for now, then in zip(self._read(), self._began, strict=True))
        return max(used - own, 0.0) / seconds

    def advice(self, threads: int) -> str | None:
        """Say that the threads of this process will wait for each other, and the remedy; None: they will not.

        Args:
            threads: of this process.
        """
        busy, cores = self.busy(), len(self._cores)
        free = max(round(cores - busy), 1)
        if not cores or threads <= free or threads + busy <= cores + SPARE:
            return None
        return (
            f"other programs keep about {busy:.1f} of {cores} cores busy, so the {threads} threads of this training "
            f"will wait for each other; OMP_NUM_THREADS={free} is faster"
        )

    def _read(self) -> tuple[float, float, float]:
        """Return seconds: by the clock, of all programs on the cores, of this process and its ended children."""
        used = 0.0
        for line in TIMES.read_text(encoding="ascii").splitlines() if self._cores else ():
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in self._cores:
                user, nice, system, _, _, interrupts, soft, stolen, *_ = map(int, ticks)
                used += (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used, sum(os.times()[:4])
