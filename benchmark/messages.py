"""Lines about a run, which must not cost the run (a terminal may be closed), and of wrong usage."""

import os
import sys
from typing import TextIO


class UsageError(ValueError):
    """What was asked cannot be done; the message says what to do, in one line."""


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line if that is possible; where it is not, nothing more is tried there.

    Args:
        line: what to say; names in it are to be `printable`.
        stream: standard output or error; standard error unless named.
    """
    stream = stream or sys.stderr
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        # The line stays in the stream's buffer, and would fail whoever flushes it next.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is stream:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
