"""`python -m cluster`, from the project's root: there the workers look for its packages."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has been begun: no traceback

    from cluster.command import main

    sys.exit(main())
