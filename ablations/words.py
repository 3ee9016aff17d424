"""Words and tables for people, alike wherever something is said."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

_CELL = 44  # characters: longer cells are wrapped, so that a terminal of 120 columns holds a row


def in_words(variant: str, x: float | None) -> str:
    """A trial as a person knows it: its series, and where it stands on it."""
    return variant if x is None else f"{variant} (x = {x:g})"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'budget'?`` or nothing."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def table(header: list[str], rows: list[list[str]], *, indent: str = "") -> str:
    """Aligned columns, a rule under the header."""
    cells = [[textwrap.wrap(cell, _CELL) or [""] for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        for line in range(max(len(cell) for cell in row)):
            texts = [cell[line] if line < len(cell) else "" for cell in row]
            padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
            lines.append((indent + "  ".join(padded)).rstrip())
        if number == 0:
            lines.append(indent + "  ".join("-" * width for width in widths))
    return "\n".join(lines)
