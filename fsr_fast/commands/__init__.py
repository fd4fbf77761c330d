"""The verbs of `fsr-fast`, one module each, with `main(arguments)`; their command lines are in parsers.py."""
