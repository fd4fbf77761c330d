"""What was inferred about a data set, so that nothing is guessed silently."""

from __future__ import annotations

import logging
from collections.abc import Iterator


class Notes:
    """Remarks about how a data set was read, each once, in the order in which they were made."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, int]] = {}

    def add(self, text: str, example: str = "", level: int = logging.INFO) -> None:
        """Note something, unless it is noted already.

        Args:
            text: the remark; the same text is kept once.
            example: the first case that showed it.
            level: `logging.WARNING` if the reading decides what is learned or scored.
        """
        self._texts.setdefault(text, (example, level))

    def __iter__(self) -> Iterator[str]:
        """Return the remarks, with the first example of each."""
        for text in list(self._texts):
            yield self._shown(text)

    def _shown(self, text: str) -> str:
        example = self._texts[text][0]
        return f"{text}, for example {example}" if example else text

    def log(self, logger: logging.Logger, said: set[str]) -> None:
        """Log each remark once, except those already logged for another list."""
        for text, (_, level) in list(self._texts.items()):
            if text not in said:
                logger.log(level, "data: %s", self._shown(text))
            said.add(text)
