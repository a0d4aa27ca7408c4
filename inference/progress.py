"""What a run prints as it goes on: lines, a bar, and the closing table."""

import contextlib
import sys
from typing import TextIO

from .case import Case
from .files import printable
from .phases import PhaseTimer
from .records.flags import in_words
from .records.manifest import Records
from .service import STAGES, Observer


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line; a terminal, pipe or disk that is gone or full must not cost a case."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line), file=stream or sys.stderr, flush=True)


class Progress(Observer):
    """Keeps the records of a run and prints how it goes.

    A bar per case when standard error is a terminal, a line per case otherwise.

    Args:
        total: number of cases.
        records: of the run.
        quiet: print errors and warnings only.
    """

    def __init__(self, total: int, records: Records, *, quiet: bool) -> None:
        self.recorded = records.recorded
        self._records = records
        self.total = total
        self.quiet = quiet
        self.ended = 0
        self.bar = None

    def on_slices(self, case: Case, count: int, total: int) -> None:
        """Show so many slices more of a case's total."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=printable(case.name), unit="slice", leave=False)
        with contextlib.suppress(OSError, ValueError):
            self.bar.update(count)
        if self.bar.n >= self.bar.total:
            self.bar.close()
            self.bar = None

    def on_case(self, case: Case) -> None:
        """Record a case that has ended, and print what became of it."""
        self._records.add(case)
        self.ended += 1
        for warning in case.warnings:
            print_line(f"warning: {case.source}: {warning}")
        if case.status == "failed":
            print_line(f"error: {case.source}: {case.reason}")
        elif not self.quiet:
            print_line(f"[{self.ended}/{self.total}] {case.name}: {case.status}")
            if case.flags:
                print_line(f"check {case.name}: {in_words(case.flags)}")


def closing_table(cases: list[Case], timer: PhaseTimer) -> str:
    """The closing table: case, shape, seconds per stage, status."""
    rows = [("case", "shape", *STAGES, "status")]
    for case in cases:
        seconds = timer.seconds(case.name) if case.status != "kept" else {}
        rows.append(
            (
                printable(case.name),
                "×".join(map(str, case.shape)) or "-",
                *(f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES),
                case.status,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
