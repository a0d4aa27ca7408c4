"""Text for people: lines on a terminal that may be closed, and Markdown tables."""

import html
import sys
from collections.abc import Iterable, Sequence

from inference.files import printable
from inference.terminal import log


def show(text: str) -> None:
    """Print a page or table to standard output."""
    log(*text.splitlines(), to=sys.stdout)


def cell(text: object) -> str:
    """Return text that ends neither a table's cell nor a line, nor becomes a tag or code."""
    shown = printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return html.escape(shown, quote=False)


def table(columns: Sequence[str], align: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; its cells are escaped.

    Args:
        columns: titles.
        align: "l" or "r" for each column.
        rows: of cells; None is an empty one.
    """
    lines = [columns, *rows]
    text = [" | ".join("" if part is None else cell(part) for part in line) for line in lines]
    rule = "|".join({"l": "---", "r": "---:"}[side] for side in align)
    return "\n".join([f"| {text[0]} |", f"|{rule}|", *(f"| {line} |" for line in text[1:])])


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list; its lines are Markdown already."""
    return "\n".join(f"- {line}" for line in lines)


def number_or_dash(value: float | None, form: str) -> str:
    """Return a number in a format, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def by(size: Iterable[int]) -> str:
    """Return a volume's size as 512×512×100."""
    return "×".join(map(str, size))


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return names with commas between, and of many how many more."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def plural(number: int, word: str) -> str:
    """Return "1 case" or "3 cases"."""
    return f"{number} {word}{'' if number == 1 else 's'}"
