"""What a run reports as it goes on: a bar or lines for each case, and the closing table."""

import contextlib
import sys
import time
import unicodedata
from typing import TYPE_CHECKING

from .case import Case
from .files import printable
from .phases import PhaseTimer
from .records.flags import in_words
from .records.manifest import Records
from .service import STAGES, Observer
from .terminal import log

if TYPE_CHECKING:
    from tqdm import tqdm

_SILENT_SECONDS = 30.0  # without a bar: so long at most without a line while slices are predicted


class Progress(Observer):
    """Keeps the records of a run and reports how it goes.

    A bar for each case where standard error is a terminal; otherwise lines, also within a case.
    If quiet only errors are printed.
    """

    def __init__(self, total: int, records: Records, *, quiet: bool) -> None:
        self._records, self.total, self.quiet = records, total, quiet
        self.ended = 0
        self.bar: tqdm | None = None
        self._case = ""
        self._slices = 0
        self._reported = 0.0

    def recorded(self, name: str) -> dict | None:
        """Return the record of a case; None if one is missing that was asked for."""
        return self._records.recorded(name)

    def on_slices(self, case: Case, count: int, total: int) -> None:
        """Report so many slices more of a case's total."""
        if self.quiet:
            return
        if case.name != self._case:
            self._case, self._slices, self._reported = case.name, 0, time.monotonic()
        self._slices += count
        if sys.stderr.isatty():
            self._update_bar(case.name, count, total)
        elif time.monotonic() - self._reported >= _SILENT_SECONDS:
            self._reported = time.monotonic()
            log(f"{case.name}: {self._slices} of {total} slices")

    def _update_bar(self, name: str, count: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=printable(name), unit="slice", leave=False)
        with contextlib.suppress(OSError, ValueError):
            self.bar.update(count)
            if self._slices >= total:
                self.bar.close()
        if self._slices >= total:
            self.bar = None

    def on_case(self, case: Case) -> None:
        """Record a case that has ended, and report what became of it."""
        self._records.add(case)
        self.ended += 1
        lines = [] if self.quiet else [f"warning: {case.source}: {text}" for text in case.warnings]
        if case.status == "failed":
            lines.append(f"error: {case.source}: {case.reason}")
        elif not self.quiet:
            lines.append(f"[{self.ended}/{self.total}] {case.name}: {case.status}")
            if case.flags:
                lines.append(f"check {case.name}: {in_words(case.flags)}")
        bar = self.bar  # another thread may be about to end it
        with bar.external_write_mode(file=sys.stderr) if bar else contextlib.nullcontext():
            log(*lines)


def closing_table(cases: list[Case], timer: PhaseTimer) -> str:
    """Return the closing table: case, shape, seconds of each step, status."""
    rows = [["case", "shape", *STAGES, "status"]]
    for case in cases:
        # A case that was not read may have the name of another.
        seconds = timer.seconds(case.name) if case.shape and case.status != "kept" else {}
        shown = [f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES]
        shape = "×".join(map(str, case.shape)) or "-"
        rows.append([printable(case.name), shape, *shown, case.status])
    columns = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(_width, cells))
        spaces = [" " * (width - _width(cell)) for cell in cells]
        before = 0 < number <= 1 + len(STAGES)  # numbers
        columns.append([s + c if before else c + s for s, c in zip(spaces, cells, strict=True)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def _width(text: str) -> int:
    """Return the columns that a text takes on a terminal."""
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)
