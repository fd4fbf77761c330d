"""Text of others in Markdown: shown as it is, whatever it holds."""

from __future__ import annotations

import html
import re


def plain(text: str) -> str:
    """Return text whose marks and HTML are shown and not obeyed; on one line."""
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def code(value: object) -> str:
    """Return a value as code, on one line; backticks, which would end it, become apostrophes."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"
