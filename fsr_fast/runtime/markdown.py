"""Untrusted text in Markdown, shown literally."""

from __future__ import annotations

import html
import re


def plain(text: str) -> str:
    """Return text, on one line, with Markdown and HTML escaped."""
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def code(value: object) -> str:
    """Return a value as code, on one line; backticks, which would end it, become apostrophes."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"
