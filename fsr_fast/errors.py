"""Errors that are the user's to mend: one paragraph, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text says what is wrong, where, what was expected and what to do."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest the name that was probably meant.

    Args:
        name: what was written.
        names: what could have been written.

    Returns:
        `"; did you mean 'x'?"`, or the list of all names where none is near.
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(known)}"
