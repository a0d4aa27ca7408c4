"""Command line of the service: `python -m inference`."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from . import startup
from .case import Case
from .files import discard_unfinished, one_line
from .loading import NetworkLoader
from .options import parse_arguments
from .phases import LOG_VARIABLE, PhaseTimer
from .progress import Progress, closing_table
from .records.colours import write_colour_tables
from .records.flags import count_in_words
from .records.manifest import Records
from .service import Service
from .signals import Stopped, signals_raise
from .sources import Source
from .startup import CANNOT_START, StartError, why_not_started
from .terminal import log


class Runner(Protocol):
    """What runs the cases, here or elsewhere: a `Service`, or something like it."""

    def run(self, sources: Sequence[Source]) -> list[Case]:
        """Segment every volume; as `Service.run`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code as `run`."""
    return run(parse_arguments(arguments), Service)


def run(options: argparse.Namespace, make_runner: Callable[..., Runner]) -> int:
    """Run what options ask for, and print what becomes of each case and of all.

    Args:
        options: of `parse_arguments`.
        make_runner: called as `Service`; if what it returns has `stop`, that is called as
            `Service.stop`.

    Returns:
        0 if every case is done (or was before), 1 if some failed or a record of them could not be
        written, 2 for wrong usage, `CANNOT_START`, 128 and its number for a signal that ended it.

    Raises:
        OSError: a file cannot be used; no case was processed.
    """
    start = time.monotonic()
    startup.share_interpreter()
    startup.silence_libraries()
    timer = PhaseTimer(os.environ.get(LOG_VARIABLE))
    if not options.quiet:
        for line in options.skipped:
            log(f"skipped: {line}")
    stopped = None
    try:
        loader = NetworkLoader(options, timer)
        if options.colours:
            write_colour_tables(options.output)
        records = Records(options, timer, loader.provenance)
        progress = Progress(len(options.sources), records, quiet=options.quiet)
        runner = make_runner(options, loader, progress, timer)
        try:
            with signals_raise(getattr(runner, "stop", None)):
                cases = runner.run(options.sources)
        except Stopped as signalled:
            stopped = signalled
            discard_unfinished()
    except ValueError as error:
        log(f"error: {one_line(error)}")
        return 2
    except (StartError, MemoryError) as error:
        log(f"error: it cannot start: {why_not_started(error)}")
        return CANNOT_START
    try:
        records.close()
    except ValueError as error:
        log(f"error: {one_line(error)}")
        return 1 if stopped is None else 128 + stopped.number
    if stopped:
        log(f"stopped by {stopped}: the label maps written so far are whole")
        return 128 + stopped.number
    if records.incomplete:
        log(f"error: --manifest {options.manifest}: not every case is in it")
    failed = sum(case.status == "failed" for case in cases)
    if not options.quiet:
        _print_summary(cases, timer, f"{time.monotonic() - start:.1f} s: {options.output}")
    return 1 if failed or records.incomplete else 0


def _print_summary(cases: list[Case], timer: PhaseTimer, end: str) -> None:
    for line in closing_table(cases, timer).splitlines():
        log(line, to=sys.stdout)
    well = [case for case in cases if case.status != "failed"]
    if flagged := count_in_words(case.flags for case in well):
        log(flagged, to=sys.stdout)
    log(f"{len(well)} of {len(cases)} cases in {end}", to=sys.stdout)
