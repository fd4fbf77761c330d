"""Entry point for torchrun: the training, but process 1 is killed before iteration 4 of its first life."""

import os
import signal
import sys
from pathlib import Path

from fsr_fast.train import main
from tests.runtime.children import before_iteration

LIFE = Path(sys.argv[1])
"""File that distinguishes a second life from the first."""


def die_once() -> None:
    if os.environ["RANK"] == "1" and not LIFE.exists():
        LIFE.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    before_iteration(3, die_once)
    main(sys.argv[2:])
