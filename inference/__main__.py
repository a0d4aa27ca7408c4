"""`python -m inference`: ready for signals and lost streams before anything slow is imported."""

from collections.abc import Callable

from inference import startup


def _load() -> Callable[[], int]:
    try:
        startup.import_nibabel()
        from inference.command import main
    except ModuleNotFoundError:
        from inference.options import make_parser

        make_parser().parse_args()  # --help and wrong usage end here
        raise
    return main


if __name__ == "__main__":
    startup.end_at_once_on_signals()
    startup.end_process(startup.run(_load))
