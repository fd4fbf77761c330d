"""The parser of all verbs: whole option names, and mistakes that end in one paragraph."""

import argparse
from typing import Any, NoReturn

from fsr_fast.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError` and name the nearest option; options cannot be shortened.

    Args:
        verb: what the user calls, e.g. `train`.
        **settings: of argparse.
    """

    def __init__(self, verb: str, **settings: Any) -> None:
        super().__init__(prog=f"fsr-fast {verb}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if not unknown:
            raise UserError(f"command line: {message}; `{self.prog} --help` describes all options")
        key = unknown[0].partition("=")[0]
        keys = [option for action in self._actions for option in action.option_strings]
        raise UserError(f"command line: unknown option {key!r}{nearest(key, keys)}")
