"""What a container wrote, parsed in a process of its own that can be ended.

A label map is a file by a stranger: whatever it does to the libraries that read it, to memory or to
time, it does to that process, and costs its own case.
"""

import math
import multiprocessing
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from benchmark.containers.output_check import OutputCheck, check_output

_BASE_BYTES = 1 << 30  # for the libraries, and for small volumes

_BYTES_PER_VOXEL = 24  # the voxels as complex128 and half as much again

_BASE_SECONDS = 60.0

_VOXELS_PER_SECOND = 2e6  # at the least; 20 times as many are usual

_START = "forkserver"  # a fork of this process would take its threads' locks with it

_PRELOAD = ["__main__", "benchmark.containers.output_check"]


def check_output_apart(path: Path, image: Path, size: tuple[int, ...]) -> OutputCheck:
    """`check_output` in a process of its own, with a limit of memory and of time.

    Args:
        path: of the label map.
        image: the input volume.
        size: the input's shape, which the limits are made from.

    Returns:
        As `check_output`; where the process is ended or dies, that the file cannot be read.
    """
    voxels = math.prod(max(1, length) for length in size)
    limit = _BASE_BYTES + _BYTES_PER_VOXEL * voxels
    seconds = _BASE_SECONDS + voxels / _VOXELS_PER_SECOND
    context = multiprocessing.get_context(_START)
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, limit, path, image), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return _unreadable(f"reading it took more than {seconds:.0f} s")
        return receiver.recv()
    except EOFError:
        return _unreadable(f"reading it ended the reader, which may take {limit >> 20:,} MB")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, limit: int, path: Path, image: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which ends this
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        check = check_output(path, image)
    except MemoryError:
        check = _unreadable(f"reading it takes more than {limit >> 20:,} MB")
    except Exception as error:  # whatever a stranger's file does to the libraries
        check = _unreadable(f"reading it failed: {type(error).__name__}")
    sender.send(check)


def _unreadable(problem: str) -> OutputCheck:
    return OutputCheck(found=True, scorable=False, problems=[problem], aspects=["file"])
