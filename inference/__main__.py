"""`python -m inference` and `abdoseg`: ready for signals before anything slow is imported."""

from collections.abc import Callable
from typing import NoReturn

from . import startup


def _load() -> Callable[[], int]:
    try:
        startup.import_nibabel()
        from .command import main
    except ModuleNotFoundError:
        from .options import make_parser

        make_parser().parse_args()  # --help and wrong usage end here
        raise
    return main


def main() -> NoReturn:
    """Run the command line and end the process."""
    startup.end_at_once_on_signals()
    startup.end_process(startup.run(_load))


if __name__ == "__main__":
    main()
