"""The verbs of `fsr-fast`, one module for each, with `main(arguments)`; their command lines stand in parsers.py."""
