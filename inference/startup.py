"""What a command line does to its process before and after its work; a library does none of it."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .cuda import driver
from .files import one_line
from .signals import STOP_SIGNALS
from .terminal import log

CANNOT_START = 3
"""Exit code where the program could not start or broke off: with 1 the rest is written."""


class StartError(Exception):
    """A package, a library or memory is missing, so that the program cannot start; one line."""


def why_not_started(error: BaseException) -> str:
    """Return what was missing, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the Python package {error.name} is missing: in a clone run `make setup`, elsewhere "
            "pip install -r requirements.txt"
        )
    return str(error) if isinstance(error, StartError) else one_line(error)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Turn what goes wrong while packages are imported into a `StartError`."""
    try:
        yield
    except Exception as error:
        raise StartError(why_not_started(error)) from error


def run(load: Callable[[], Callable[[], int]]) -> int:
    """Run a command line.

    Args:
        load: imports the function that runs it, and returns that.

    Returns:
        Its exit code; 2 if it raises an `OSError`, of a file or folder that cannot be used;
        `CANNOT_START` if something is missing, or it raises another exception.
    """
    use_utf8()
    open_standard_streams()
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read
        try:
            with starting():
                main = load()
            return main()
        except (StartError, ImportError, MemoryError) as error:
            log(f"error: it cannot start: {why_not_started(error)}")
        except OSError as error:  # of a file or folder
            where = f"{error.filename}: " if error.filename else ""
            log(f"error: {where}{one_line(error)}")
            return 2
        except Exception:
            traceback.print_exc()
    return CANNOT_START


def use_utf8() -> None:
    """Start again in Python's UTF-8 mode if file names are decoded in another encoding.

    A name would be another text in the tables of each locale, or one that cannot be written. The
    terminal's encoding stays as it is.
    """
    if sys.getfilesystemencoding() != "utf-8":
        encoding = sys.stdout.encoding if sys.stdout else "utf-8"
        os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_standard_streams() -> None:
    """Put the null device where a standard stream was closed: files must not get its number.

    What the terminal's encoding lacks is written as an escape: no name may end a run.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")


def end_at_once_on_signals() -> None:
    """Handle signals before there is work: process 1 of a container ignores them by default."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))


def import_nibabel() -> None:
    """Import nibabel without pydicom, which it takes for an extension of headers if it finds it.

    That takes 0.17 instead of 0.37 s (benchmark/LIMITS.md); only DICOM input needs pydicom.
    """
    sys.modules["pydicom"] = None  # type: ignore[assignment]
    try:
        import nibabel  # noqa: F401
    finally:
        del sys.modules["pydicom"]


def import_torch() -> None:
    """Import torch without its rules for tensors that have a shape and no values.

    They are for its compiler, which the service does not use, and take a quarter of torch's import:
    0.80 instead of 1.06 s (benchmark/results/waterfall-cpu.md). They can be imported afterwards.
    """
    if "torch" in sys.modules:
        return
    rules = "torch._meta_registrations"
    sys.modules[rules] = ModuleType(rules)
    try:
        import torch
    finally:
        del sys.modules[rules]
    vars(torch).pop("_meta_registrations", None)  # not every version of torch names it


def initialise_cuda() -> None:
    """Set torch's allocator up, and initialise the driver while torch is imported, if there is one.

    An allocator that lets its blocks grow, instead of adding more, keeps less memory: in a model
    of it 2,260 instead of 2,730 MB at a batch of 16.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    driver.initialise()


def reuse_freed_memory() -> None:
    """Let malloc keep what is freed, for every map of the network is as large as one before it.

    By default glibc maps large blocks anew and gives them back each time, and the kernel clears
    every page again: 12 to 20 % of the network's time (benchmark/results/waterfall-cpu.md). Blocks
    of 256 MB and more, whole volumes, are still given back. Other C libraries have no such options.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 256 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: what one thread has freed serves the others


def share_interpreter() -> None:
    """Switch threads every 0.2 ms instead of 5: a volume is read while torch is imported.

    Its percentiles take 0.15 to 0.2 s then, instead of 4.1 (benchmark/LIMITS.md).
    """
    sys.setswitchinterval(0.0002)


def silence_libraries() -> None:
    """Silence libraries' warnings; our own errors have what matters of a file."""
    warnings.filterwarnings("ignore")
    for library in ("nibabel", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def end_process(code: int) -> NoReturn:
    """End now that everything is written: 0.02 s instead of 0.33 for taking torch apart."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
            stream.flush()
    os._exit(code)


def use_for_temporary_files(folder: Path) -> None:
    """Let temporary files (matplotlib's cache) lie in a folder if no usual one can be written."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder.resolve())
