"""Tables of text for terminals: columns as wide as their widest cell."""

import unicodedata
from collections.abc import Collection, Sequence

__all__ = ["aligned", "width_of"]


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return one line for each row, with two blanks between its cells.

    Args:
        rows: Equally long rows of cells, the header among them.
        left: Columns that align left; the others align right.
    """
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        blanks = [" " * (width - width_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + blanks[i] if i in left else blanks[i] + cell for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def width_of(text: str) -> int:
    """Return the number of terminal columns that text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
