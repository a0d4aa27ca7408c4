"""Processes that leave the process group of what is measured: daemons, by `setsid` or two forks.

On Linux a process may ask for the orphans below it. Those that a command leaves behind then become
children of the harness, which ends them, where they would else have become the system's.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

_ROUNDS = 20  # what is ended may have started another just before

_SECONDS_TO_END = 2.0


@contextmanager
def orphans_ended() -> Iterator[None]:
    """Whatever the block started, directly or not, and left running is killed at its end."""
    own = psutil.Process()
    before = set(own.children())
    _take_orphans(True)
    try:
        yield
    finally:
        try:
            for _ in range(_ROUNDS):
                left = [child for child in own.children() if child not in before]
                if not left:
                    break
                for child in left:
                    _kill_tree(child)
                psutil.wait_procs(left, _SECONDS_TO_END)
        finally:
            _take_orphans(False)


def _kill_tree(process: psutil.Process) -> None:
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.Error:
        return
    for member in members:
        try:
            member.kill()
        except psutil.Error:
            continue


def _take_orphans(wanted: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)
