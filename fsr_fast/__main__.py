"""`python -m fsr_fast VERB …`, the same as `fsr-fast VERB …`."""

from fsr_fast.cli import main

main()
