"""What a run tells as it goes on: lines, a bar, and the closing table."""

import contextlib
import sys
from typing import TextIO

from .case import Case
from .files import printable
from .phases import PhaseTimer
from .records.flags import in_words
from .service import STAGES


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line; a terminal, pipe or disk that is gone or full must not cost a case."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line), file=stream or sys.stderr, flush=True)


class Progress:
    """A bar per case when standard error is a terminal, a line per case otherwise."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total = total
        self.quiet = quiet
        self.ended = 0
        self.bar = None

    def on_slices(self, case: Case, count: int) -> None:
        """So many slices more of a case have been predicted."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self.bar is None:
            from tqdm import tqdm

            slices = len(case.volume.voxels)
            self.bar = tqdm(total=slices, desc=printable(case.name), unit="slice", leave=False)
        with contextlib.suppress(OSError, ValueError):
            self.bar.update(count)
        if self.bar.n >= self.bar.total:
            self.bar.close()
            self.bar = None

    def on_case(self, case: Case) -> None:
        """A case has ended."""
        self.ended += 1
        for warning in case.warnings:
            say(f"warning: {case.source}: {warning}")
        if case.status == "failed":
            say(f"error: {case.source}: {case.reason}")
        elif not self.quiet:
            say(f"[{self.ended}/{self.total}] {case.name}: {case.status}")
            if case.flags:
                say(f"check {case.name}: {in_words(case.flags)}")


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
