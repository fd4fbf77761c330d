"""Errors for the user to fix: one paragraph, no traceback."""

import difflib
import re
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text says what is wrong, where, what was expected and what to do."""


def printable(text: str) -> str:
    """Return text safe for a terminal: control characters, and what cannot be encoded, are escaped as in `\\x1b`."""
    return "".join(
        one.encode("unicode_escape").decode()
        if unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t"
        else one
        for one in text
    )


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Suggest the name that was probably meant.

    Args:
        name: what was written.
        names: what could have been written.
        prefix: what precedes the name in the suggestion.

    Returns:
        `"; did you mean 'x'?"`, or the list of all names if none is close.
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1) or [one for one in known if _stands_for(name, one)]
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known are: {', '.join(known)}"


def _stands_for(name: str, known: str) -> bool:
    """Return whether a name is the initials of another, or one of its words: `lr` or `rate` for `learning_rate`."""
    short, parts = name.lower(), re.split(r"[_-]", known.lower())
    return len(short) > 1 and (short in parts or short == "".join(part[:1] for part in parts))
