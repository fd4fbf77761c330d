"""Tables as the documents hold them."""

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Iterable[str]], *, right: int = 0) -> str:
    """Return a table in Markdown; so many columns at its end are aligned to the right."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return "\n".join((head, f"|{'---|' * (len(titles) - right)}{'---:|' * right}", *body))
