"""Print a script that completes verbs, options and their values: `fsr-fast completion bash|zsh|fish`."""

import argparse
from collections.abc import Sequence

import shtab

from fsr_fast.cli import VERBS, parser_of, run_command


def main(arguments: Sequence[str]) -> None:
    """Print the script of one shell."""
    shell = parser_of("completion").parse_args(arguments).shell
    whole = argparse.ArgumentParser("fsr-fast")
    verbs = whole.add_subparsers()
    for name, verb in VERBS.items():
        parser = parser_of(name)
        for action in parser.key_actions():
            action.choices = action.words or None
        verbs.add_parser(name, help=verb.purpose)
        verbs._name_parser_map[name] = parser
    print(shtab.complete(whole, shell))


if __name__ == "__main__":
    run_command(main)
