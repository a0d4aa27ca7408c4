"""`python -m cluster`, from the project's root: there the workers look for its packages."""

import sys
from collections.abc import Callable

from inference import startup


def _load() -> Callable[[], int]:
    from cluster.command import main

    return main


if __name__ == "__main__":
    startup.end_at_once_on_signals()
    sys.exit(startup.run(_load))
