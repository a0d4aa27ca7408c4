"""`python -m inference`: ready for signals and lost streams before anything slow is imported."""

import os
import signal
import sys


def _end_at_once(number: int, _frame: object) -> None:
    os._exit(128 + number)  # nothing has been begun: there is nothing to tidy


def _open_standard_streams() -> None:
    """Put the null device where a standard stream was closed: files must not get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _import_nibabel() -> None:
    """Import nibabel without pydicom, which it takes for an extension of headers if it finds it.

    It would cost every start of a container 0.2 s, of which only DICOM input has any use.
    """
    sys.modules["pydicom"] = None
    try:
        import nibabel  # noqa: F401
    finally:
        del sys.modules["pydicom"]


if __name__ == "__main__":
    # Process 1 of a container is deaf to signals that it has no handler for.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_at_once)
    _open_standard_streams()

    import contextlib

    try:
        _import_nibabel()
        from inference.command import main
    except ModuleNotFoundError as error:
        from inference.options import make_parser

        parser = make_parser()
        parser.parse_args()  # --help and wrong usage end here
        parser.exit(
            2,
            f"error: the Python package {error.name} is missing: in a clone run `make setup`, "
            "elsewhere pip install -r requirements.txt\n",
        )
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
            stream.flush()
    os._exit(code)  # everything is written; taking torch apart piece by piece would take 0.3 s
