"""The verbs of `fsr-fast`, one module for each: `main(arguments)` and `build_parser()`."""
