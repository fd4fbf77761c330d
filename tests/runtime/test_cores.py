"""Advice about threads where other programs keep cores busy."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from fsr_fast.config import load_config
from fsr_fast.runtime import cores
from fsr_fast.runtime.distributed import Process
from fsr_fast.trainer import Trainer


class Stat:
    """Stands for /proc/stat: a file with the time that each core was in use."""

    def __init__(self, path, monkeypatch):
        self._path = path
        self._clock = 100.0
        self.write(0, 0, 0)
        monkeypatch.setattr(cores, "TIMES", path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        monkeypatch.setattr(time, "perf_counter", lambda: self._clock)
        parts = (0.02, 0.01, 0.04, 0.03)  # of a second: user and system, own and of ended children
        monkeypatch.setattr(os, "times", lambda: (*(self._clock * part for part in parts), self._clock))

    def write(self, *seconds):
        ticks = [round(second * os.sysconf("SC_CLK_TCK")) for second in seconds]
        lines = ["cpu  9 9 9 9 9 9 9 9 9 9", *(f"cpu{n} {t} 0 0 77 5 0 0 0 0 0" for n, t in enumerate(ticks)), "ctxt 5"]
        self._path.write_text("\n".join(lines))
        self._clock += 10


@pytest.mark.parametrize(
    ("seconds", "threads", "advice"),
    [
        ((1.0, 0.0, 10.0), 2, None),  # its own second, and another program on a core that is not ours
        ((6.0, 5.0, 0.0), 2, r"about 1\.0 of 2 cores busy, so the 2 threads .* OMP_NUM_THREADS=1 "),
        ((6.0, 5.0, 0.0), 1, None),
        ((10.0, 10.0, 0.0), 2, r"about 1\.9 .* OMP_NUM_THREADS=1 "),
        ((2.0, 1.0, 0.0), 2, None),  # 0.2 cores
    ],
)
def test_threads_beyond_the_free_cores_are_advised_against(tmp_path, monkeypatch, seconds, threads, advice):
    stat = Stat(tmp_path / "stat", monkeypatch)
    others = cores.OtherPrograms()
    stat.write(*seconds)
    found = others.advice(threads)
    assert (found is None) if advice is None else re.search(advice, found)


@pytest.mark.skipif(not cores.TIMES.is_file(), reason="no /proc")
def test_a_process_that_keeps_a_core_busy_is_seen():
    others = cores.OtherPrograms()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(1.0)
        busy = others.busy()
        process.kill()
    assert 0.3 < busy < len(os.sched_getaffinity(0)) + 0.2


def test_where_nothing_can_be_read_nothing_is_advised(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "TIMES", tmp_path / "none")
    assert cores.OtherPrograms().advice(64) is None


@pytest.mark.parametrize(("processes", "said"), [(1, True), (2, False)], ids=["one process", "one of two"])
def test_a_training_on_a_cpu_says_it_as_it_starts(recipe, monkeypatch, caplog, processes, said):
    monkeypatch.setattr(cores.OtherPrograms, "advice", lambda self, threads: f"advice for {threads}")
    config = load_config(["--config", str(recipe("run"))])[0]
    with caplog.at_level("WARNING"):
        Trainer(config, Process(0, processes, torch.device("cpu"))).close()
    assert (f"advice for {torch.get_num_threads()}" in caplog.text) == said
