"""Start and end of each phase of a run, for the closing table and for the benchmark."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import terminal

LOG_VARIABLE = "ABDOSEG_PHASE_LOG"
"""Environment variable naming the file to which phases are appended."""


class PhaseTimer:
    """Times phases, in any thread, and appends each to a log as it ends.

    Args:
        log: name of a file for lines of JSON, `{"phase", "case", "start", "end"}`, in seconds of
            CLOCK_MONOTONIC, which all processes and containers of a host share; "" or None for
            none. If it cannot be written, a warning is printed.
    """

    def __init__(self, log: str | None = None) -> None:
        self._log = Path(log) if log else None
        self._lock = threading.Lock()
        self._seconds: dict[str | None, dict[str, float]] = defaultdict(dict)

    @contextmanager
    def phase(self, name: str, case: str | None = None) -> Iterator[None]:
        """Time the block as one phase of a case, or of the whole run."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._seconds[case][name] = end - start
            line = json.dumps({"phase": name, "case": case, "start": start, "end": end})
            with self._lock:
                self._append(line)

    def _append(self, line: str) -> None:
        if self._log is None:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            name = f"{LOG_VARIABLE} {self._log}"
            terminal.log(f"warning: {name}: no phases are logged: {error.strerror}")
            self._log = None

    def seconds(self, case: str | None) -> dict[str, float]:
        """Return the seconds per phase of a case (None: of the run), in the order of their ends."""
        return dict(self._seconds[case])

    def record(self, case: str, seconds: dict[str, float]) -> None:
        """Add the seconds per phase of a case that another process has timed."""
        self._seconds[case].update(seconds)
