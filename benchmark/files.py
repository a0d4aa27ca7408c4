"""Files that the commands write: JSON, tables, plots; whole or not at all."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmark.text import log
from inference.files import write_atomically


def write_json(path: Path, content: dict) -> None:
    """Write a file that is one JSON value."""
    write_atomically(path, json.dumps(content) + "\n")


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file; None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a comma-separated table."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    return table.getvalue()


def write_plot(path: Path, plot: Callable[..., Any], *arguments: object) -> None:
    """Write the PNG of a matplotlib figure that `plot` returns; an error costs the plot alone."""
    try:
        content = io.BytesIO()
        plot(*arguments).savefig(content, format="png", dpi=120)
        write_atomically(path, content.getvalue())
    except Exception as error:  # whatever a name, a number or a missing folder does to the library
        log(f"{path.name}: no plot: {error}")
